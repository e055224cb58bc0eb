# SPDX-License-Identifier: Apache-2.0
"""What a token costs, what its cost is divided by, and the mean of it all."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from moepeft.nn.precision import wide
from moepeft.typing import Array, Batch

PER = ('tokens', 'sequences')


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


def token_losses(logits: Array, targets: Array) -> Array:
  """-log p of each target in nats: [b, t, v] and [b, t] -> [b, t]."""
  return optax.softmax_cross_entropy_with_integer_labels(wide(logits), targets)


def minimised_losses(nll: Array, logits: Array, loss: Loss) -> Array:
  """Token losses with smoothed labels and the z-loss: [b, t].

  The smoothed target has 1 - s at the label and s / (v - 1) elsewhere; its
  own entropy is subtracted, so that the best prediction costs nothing. Both
  terms are those of T5X's `compute_weighted_cross_entropy`; [b, t, v] is read
  but no array of that size is made.

  Args:
    nll: [b, t], from `token_losses`.
    logits: [b, t, v].
  """
  if not (loss.z or loss.label_smoothing):
    return nll
  logits = wide(logits)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  losses = nll
  if loss.label_smoothing:
    v, s = logits.shape[-1], loss.label_smoothing
    # The others' -log p: all of them, less the label's.
    others = v * (log_z - jnp.mean(logits, axis=-1)) - nll
    entropy = -(1 - s) * math.log(1 - s) - s * math.log(s / (v - 1))
    losses = (1 - s) * nll + s / (v - 1) * others - entropy
  return losses + loss.z * log_z**2


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
