# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy with label smoothing and z-loss, averaged over tokens or
sequences."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from moepeft.core.ranges import Choices, Range, is_zero, option
from moepeft.core.types import Array, Batch
from moepeft.nn.numerics import to_f32
from moepeft.objectives.objective import check_options

AVERAGE_OVER = ('tokens', 'sequences')
# The gradient of the logits is computed for this many tokens of a row at once.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class CrossEntropySettings:
  """Settings of config.loss.

  Attributes:
    average_over: 'tokens' for the mean over tokens; 'sequences' for the mean
      over examples of each example's mean over tokens (T5X's
      AVERAGE_PER_SEQUENCE).
    z_loss: weight of the squared log-partition of each token, as in T5X.
    label_smoothing: the probability that the target distribution gives to the
      other tokens of the vocabulary together.
    consistency: weight of `consistency_losses` between two passes of a training
      step, which differ in dropout and router noise.

  Raises:
    ValueError: a value is out of range.
  """

  average_over: str = option('tokens', Choices(AVERAGE_OVER))
  z_loss: float = option(0.0, Range(0, 1_000))
  label_smoothing: float = option(0.0, Range(0, 1, below=True))
  consistency: float = option(0.0, Range(0, 1_000))

  def __post_init__(self):
    check_options(self, 'loss')


DEFAULTS = CrossEntropySettings()


@jax.custom_vjp
def log_terms(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
  """Returns (log-partition, target logit, mean logit), each float32 [b, t].

  All losses of this file are functions of these three. The gradient is written
  over the logits block by block, so memory holds [b, t, v] once, and no softmax
  or one-hot array. Only reverse-mode differentiation works.

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
  """Writes the gradient over the logits, in blocks of tokens."""
  logits, targets, log_z = residuals
  t = targets.shape[1]
  block = max(n for n in range(1, _BLOCK + 1) if t % n == 0)

  def write(i, buffer):
    get_block = functools.partial(
      jax.lax.dynamic_slice_in_dim,
      start_index=i * block,
      slice_size=block,
      axis=1,
    )
    gradient = _logits_gradient(
      get_block(buffer),
      get_block(targets),
      get_block(log_z),
      *map(get_block, cotangents),
    )
    return jax.lax.dynamic_update_slice_in_dim(
      buffer, gradient, i * block, axis=1
    )

  return jax.lax.fori_loop(0, t // block, write, logits), None


def _logits_gradient(logits, targets, log_z, d_log_z, d_target, d_mean):
  """The vector-Jacobian product with cotangents [b, t]: [b, t, v]."""
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
  """Returns (-log p, the training loss of `settings`), each [b, t].

  The smoothed target distribution is 1 - s at the label and s / (v - 1)
  elsewhere; its entropy is subtracted, so that the minimum of the loss is 0.
  Both terms are as in T5X's `compute_weighted_cross_entropy`.

  Args:
    logits: [b, t, v].
    targets: int [b, t].
  """
  log_z, target_logits, mean_logit = log_terms(logits, targets)
  nll = losses = log_z - target_logits
  if settings.label_smoothing:
    v, s = logits.shape[-1], settings.label_smoothing
    # The sum of -log p over the vocabulary without the label.
    others_nll = v * (log_z - mean_logit) - nll
    entropy = -(1 - s) * math.log(1 - s) - s * math.log(s / (v - 1))
    losses = (1 - s) * nll + s / (v - 1) * others_nll - entropy
  if not is_zero(settings.z_loss):
    losses += settings.z_loss * log_z**2
  return nll, losses


def consistency_losses(logits: Array, other_logits: Array) -> Array:
  """(KL(p, q) + KL(q, p)) / 2 of each token in nats, [b, t].

  The gradient is that of the released code of AdaMix (Wang et al.,
  arXiv:2205.12410, equation 6): it flows through the second distribution of
  each divergence only.

  Args:
    logits, other_logits: [b, t, v] of two passes over the same tokens.
  """

  def divergence(fixed, log_q):
    log_p = jax.lax.stop_gradient(fixed)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

  p, q = (
    jax.nn.log_softmax(to_f32(a), axis=-1) for a in (logits, other_logits)
  )
  return (divergence(p, q) + divergence(q, p)) / 2


def loss_divisors(batch: Batch, average_over: str) -> tuple[Array, Array]:
  """Returns the divisor of each target's loss, int [b, t], and of the sum, [].

  Over tokens they are 1 and the number of targets. Over sequences they are the
  number of targets in the example, at least 1, and the number of examples with
  targets. Padding is not counted. An example is a segment if the batch has
  `targets_segments` (int [b, t], 0 on padding), otherwise a row.
  """
  mask = batch['targets_mask']
  if average_over == 'tokens':
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
  """The mean loss of an objective's (sum, aux); 0 if the weight is 0."""
  weight = aux['weight']
  return total / jnp.where(weight > 0, weight, 1)


def sequence_log_likelihood(
  logits: Array, targets: Array, mask: Array
) -> Array:
  """Sum of the log-probabilities of the targets, EOS included: [b]."""
  losses = token_losses(logits, targets)
  return -jnp.sum(jnp.where(mask, losses, 0), axis=-1)
