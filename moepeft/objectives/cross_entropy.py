# SPDX-License-Identifier: Apache-2.0
"""What a token costs, what its cost is divided by, and the mean of it all."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch
from moepeft.nn.numerics import to_f32

PER = ('tokens', 'sequences')
# Tokens of a row whose gradient is made at once.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Loss:
  """What config.loss says.

  Attributes:
    per: what the loss is a mean over: 'tokens', or 'sequences' (of each
      example's own mean over its tokens; T5X's AVERAGE_PER_SEQUENCE).
    z: weight of a token's squared log-partition (T5X's z_loss).
    label_smoothing: the share of a target's probability that the rest of the
      vocabulary gets.

  Raises:
    ValueError: `per` is neither.
  """

  per: str = 'tokens'
  z: float = 0.0
  label_smoothing: float = 0.0

  def __post_init__(self):
    if self.per not in PER:
      raise ValueError(
        f'config.loss.per is one of {", ".join(PER)}; got {self.per!r}'
      )


PLAIN = Loss()


@jax.custom_vjp
def log_terms(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
  """(log-partition, the target's logit, mean logit), each float32 [b, t].

  Every loss here is made of these. Their gradient is one pass over the logits
  (softmax and one-hot are never stored), and [b, t, v] is held once: the
  gradient takes the place of the logits. In reverse mode only.

  Args:
    logits: [b, t, v].
    targets: int [b, t].
  """
  wider = to_f32(logits)
  picked = jnp.take_along_axis(wider, targets[..., None], axis=-1)
  log_z = jax.nn.logsumexp(wider, axis=-1)
  return log_z, picked[..., 0], jnp.mean(wider, axis=-1)


def _log_terms_forward(logits, targets):
  terms = log_terms(logits, targets)
  return terms, (logits, targets, terms[0])


def _log_terms_backward(kept, slopes):
  """Block by block along t, each in its logits' place: no second [b, t, v]."""
  logits, targets, log_z = kept
  t = targets.shape[1]
  block = max(n for n in range(1, _BLOCK + 1) if t % n == 0)

  def write(i, held):
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim,
      start_index=i * block,
      slice_size=block,
      axis=1,
    )
    found = _slope(cut(held), cut(targets), cut(log_z), *map(cut, slopes))
    return jax.lax.dynamic_update_slice_in_dim(held, found, i * block, axis=1)

  return jax.lax.fori_loop(0, t // block, write, logits), None


def _slope(logits, targets, log_z, of_log_z, of_picked, of_mean):
  """The gradient of slopes [b, t] times terms: as logits [b, t, v]."""
  p = jnp.exp(to_f32(logits) - log_z[..., None])
  hit = jnp.arange(logits.shape[-1]) == targets[..., None]
  slope = p * of_log_z[..., None] + jnp.where(hit, of_picked[..., None], 0)
  slope += of_mean[..., None] / logits.shape[-1]
  return slope.astype(logits.dtype)


log_terms.defvjp(_log_terms_forward, _log_terms_backward)


def token_losses(logits: Array, targets: Array) -> Array:
  """-log p of each target in nats: [b, t, v] and [b, t] -> [b, t]."""
  log_z, picked, _ = log_terms(logits, targets)
  return log_z - picked


def minimised_losses(
  logits: Array, targets: Array, loss: Loss
) -> tuple[Array, Array]:
  """(token losses, the same with smoothed labels and the z-loss): [b, t] each.

  The smoothed target has 1 - s at the label and s / (v - 1) elsewhere; its
  own entropy is subtracted, so that the best prediction costs nothing. Both
  terms are those of T5X's `compute_weighted_cross_entropy`.

  Args:
    logits: [b, t, v].
    targets: int [b, t].
  """
  log_z, picked, mean_logit = log_terms(logits, targets)
  nll = losses = log_z - picked
  if loss.label_smoothing:
    v, s = logits.shape[-1], loss.label_smoothing
    # The others' -log p: all of them, less the label's.
    others = v * (log_z - mean_logit) - nll
    entropy = -(1 - s) * math.log(1 - s) - s * math.log(s / (v - 1))
    losses = (1 - s) * nll + s / (v - 1) * others - entropy
  return nll, losses + loss.z * log_z**2 if loss.z else losses


def divisors(batch: Batch, per: str) -> tuple[Array, Array]:
  """What each target's loss is divided by, and the sum then: [b, t] and [].

  Per tokens, 1 and the real targets. Per sequences, the real targets of its
  own example and the examples that have one; an example is a segment where
  the batch has `targets_segments` (int [b, t], 0 on padding), else a row. All
  are whole numbers, and the first is at least 1.
  """
  real = batch['targets_mask']
  if per == 'tokens':
    return jnp.ones(real.shape, jnp.int32), jnp.sum(real)
  segments = batch.get('targets_segments')
  if segments is None:
    segments = jnp.zeros(real.shape, jnp.int32)
  # A row has no more segments than tokens.
  lengths = jax.vmap(
    lambda ones, ids: jax.ops.segment_sum(ones, ids, ones.size + 1)
  )(real.astype(jnp.int32), segments)
  own = jnp.take_along_axis(lengths, segments, axis=1)
  return jnp.maximum(own, 1), jnp.sum(lengths > 0)


def mean(total: Array, aux: dict[str, Array]) -> Array:
  """What an objective returns as a mean; zero where nothing weighs."""
  weight = aux['weight']
  return total / jnp.where(weight > 0, weight, 1)
