# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of targets given inputs, for encoder-decoders."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moepeft.nn.precision import wide
from moepeft.typing import Array, Batch, Tree


def token_losses(logits: Array, targets: Array) -> Array:
  """-log p of each target in nats: [b, t, v] and [b, t] -> [b, t]."""
  return optax.softmax_cross_entropy_with_integer_labels(wide(logits), targets)


def objective(
  apply: Callable, variables: Tree, batch: Batch, rngs: dict[str, Array] | None
) -> tuple[Array, dict[str, Tree]]:
  """Mean loss of a real target token, and what was seen on the way.

  Args:
    apply: the model's `apply`.
    variables: {'params': ..., 'peft': ...}.
    batch: inputs, decoder_inputs, targets and their masks.
    rngs: keys 'dropout' and 'router' in training, None in evaluation.

  Returns:
    The loss in nats a token, and {'tokens': real target tokens, 'correct':
    how many of them are the most probable, 'routing': sums of every site}.
  """
  logits, seen = apply(
    variables, batch, train=rngs is not None, rngs=rngs, mutable=['routing']
  )
  real = batch['targets_mask']
  tokens = jnp.maximum(jnp.sum(real), 1)
  losses = token_losses(logits, batch['targets'])
  correct = (jnp.argmax(logits, axis=-1) == batch['targets']) & real
  aux = {
    'tokens': tokens,
    'correct': jnp.sum(correct),
    'routing': seen.get('routing', {}),
  }
  return jnp.sum(jnp.where(real, losses, 0)) / tokens, aux


def sequence_log_likelihood(
  logits: Array, targets: Array, mask: Array
) -> Array:
  """Sum of log-probabilities of the real targets, EOS included: [b]."""
  losses = token_losses(logits, targets)
  return -jnp.sum(jnp.where(mask, losses, 0), axis=-1)


def shift_right(targets: Array) -> Array:
  """Decoder inputs of targets [..., t]: the id 0, then all but the last."""
  widths = [(0, 0)] * (targets.ndim - 1) + [(1, 0)]
  return jnp.pad(targets[..., :-1], widths)


def split_rngs(rng: Array) -> dict[str, Array]:
  """The keys that a training step's model call takes."""
  dropout, router = jax.random.split(rng)
  return {'dropout': dropout, 'router': router}
