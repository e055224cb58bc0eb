# SPDX-License-Identifier: Apache-2.0
"""Token cross-entropy with label smoothing and z-loss, and means over tokens
or sequences."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from moepeft.core.ranges import Choices, Range, option
from moepeft.core.types import Array, Batch
from moepeft.nn.numerics import to_f32
from moepeft.objectives.objective import check_options

PER = ('tokens', 'sequences')
# Tokens of a row whose gradient is made at once.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class CrossEntropySettings:
  """Settings of config.loss.

  Attributes:
    average_over: the loss is a mean over 'tokens', or over 'sequences' (of
      each example's own mean over its tokens; T5X's AVERAGE_PER_SEQUENCE).
    z_loss: weight of a token's squared log-partition (T5X's z_loss).
    label_smoothing: the share of a target's probability that the rest of the
      vocabulary gets.

  Raises:
    ValueError: a value is out of range.
  """

  average_over: str = option('tokens', Choices(PER))
  z_loss: float = option(0.0, Range(0, 1_000))
  label_smoothing: float = option(0.0, Range(0, 1, below=True))

  def __post_init__(self):
    check_options(self, 'loss')


DEFAULTS = CrossEntropySettings()


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
  logits_f32 = to_f32(logits)
  target_logits = jnp.take_along_axis(logits_f32, targets[..., None], axis=-1)
  log_z = jax.nn.logsumexp(logits_f32, axis=-1)
  return log_z, target_logits[..., 0], jnp.mean(logits_f32, axis=-1)


def _log_terms_forward(logits, targets):
  terms = log_terms(logits, targets)
  return terms, (logits, targets, terms[0])


def _log_terms_backward(residuals, cotangents):
  """Block by block along t, each in its logits' place: no second [b, t, v]."""
  logits, targets, log_z = residuals
  t = targets.shape[1]
  block = max(n for n in range(1, _BLOCK + 1) if t % n == 0)

  def write(i, buffer):
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim,
      start_index=i * block,
      slice_size=block,
      axis=1,
    )
    gradient = _logits_gradient(
      cut(buffer), cut(targets), cut(log_z), *map(cut, cotangents)
    )
    return jax.lax.dynamic_update_slice_in_dim(
      buffer, gradient, i * block, axis=1
    )

  return jax.lax.fori_loop(0, t // block, write, logits), None


def _logits_gradient(logits, targets, log_z, d_log_z, d_target, d_mean):
  """The gradient of the terms, times cotangents [b, t]: as logits [b, t, v]."""
  p = jnp.exp(to_f32(logits) - log_z[..., None])
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  gradient = p * d_log_z[..., None]
  gradient += jnp.where(is_target, d_target[..., None], 0)
  gradient += d_mean[..., None] / logits.shape[-1]
  return gradient.astype(logits.dtype)


log_terms.defvjp(_log_terms_forward, _log_terms_backward)


def token_losses(logits: Array, targets: Array) -> Array:
  """-log p of each target in nats: [b, t, v] and [b, t] -> [b, t]."""
  log_z, target_logits, _ = log_terms(logits, targets)
  return log_z - target_logits


def token_nll_and_loss(
  logits: Array, targets: Array, settings: CrossEntropySettings
) -> tuple[Array, Array]:
  """(-log p, the same with smoothed labels and the z-loss): [b, t] each.

  The smoothed target has 1 - s at the label and s / (v - 1) elsewhere; its
  own entropy is subtracted, so that the best prediction costs nothing. Both
  terms are those of T5X's `compute_weighted_cross_entropy`.

  Args:
    logits: [b, t, v].
    targets: int [b, t].
  """
  log_z, target_logits, mean_logit = log_terms(logits, targets)
  nll = losses = log_z - target_logits
  if settings.label_smoothing:
    v, s = logits.shape[-1], settings.label_smoothing
    # -log p summed over the vocabulary, less the label's.
    rest = v * (log_z - mean_logit) - nll
    entropy = -(1 - s) * math.log(1 - s) - s * math.log(s / (v - 1))
    losses = (1 - s) * nll + s / (v - 1) * rest - entropy
  return nll, losses + settings.z_loss * log_z**2 if settings.z_loss else losses


def loss_divisors(batch: Batch, per: str) -> tuple[Array, Array]:
  """Divisors of each target's loss, and of their sum: [b, t] and [].

  Per tokens, 1 and the real targets. Per sequences, the real targets of its
  own example and the examples that have one; an example is a segment where
  the batch has `targets_segments` (int [b, t], 0 on padding), else a row. All
  are whole numbers, and the first is at least 1.
  """
  mask = batch['targets_mask']
  if per == 'tokens':
    return jnp.ones(mask.shape, jnp.int32), jnp.sum(mask)
  segments = batch.get('targets_segments')
  if segments is None:
    segments = jnp.zeros(mask.shape, jnp.int32)
  # A row has no more segments than tokens.
  lengths = jax.vmap(
    lambda mask_row, ids: jax.ops.segment_sum(mask_row, ids, mask_row.size + 1)
  )(mask.astype(jnp.int32), segments)
  lengths_by_token = jnp.take_along_axis(lengths, segments, axis=1)
  return jnp.maximum(lengths_by_token, 1), jnp.sum(lengths > 0)


def mean_loss(total: Array, aux: dict[str, Array]) -> Array:
  """The mean loss of an objective's (sum, aux); zero where the weight is."""
  weight = aux['weight']
  return total / jnp.where(weight > 0, weight, 1)


def sequence_log_likelihood(
  logits: Array, targets: Array, mask: Array
) -> Array:
  """Sum of log-probabilities of the real targets, EOS included: [b]."""
  losses = token_losses(logits, targets)
  return -jnp.sum(jnp.where(mask, losses, 0), axis=-1)
