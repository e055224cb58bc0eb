# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of targets: of encoder-decoders, and of decoders alone.

A decoder's rows have inputs [b, t] and, as targets, the token that follows
each; its targets_mask is True on what is trained: all of a text in pretraining,
the answers in fine-tuning.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives.cross_entropy import (
  PLAIN,
  Loss,
  divisors,
  minimised_losses,
  token_losses,
)


def objective(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  loss: Loss = PLAIN,
) -> tuple[Array, dict[str, Tree]]:
  """The sum of target losses, and what was seen on the way.

  Everything is a sum, so that parts of a batch add up to the whole; the loss
  is `mean(total, aux)`.

  Args:
    apply: the model's `apply`.
    variables: {'params': ..., 'peft': ...}.
    batch: inputs, decoder_inputs (of encoder-decoders), targets and their
      masks; packed rows have inputs_segments and targets_segments too.
    rngs: keys 'dropout' and 'router' in training, None in evaluation.
    loss: what is minimised; nothing in aux but 'weight' depends on it.

  Returns:
    The sum in nats, and {'weight': what to divide it by, a function of the
    batch alone; 'tokens': real target tokens; 'nll': the sum of their -log p,
    whatever `loss` says; 'correct': how many of them are the most probable;
    'routing': sums of every site}.
  """
  logits, seen = apply(
    variables, batch, train=rngs is not None, rngs=rngs, mutable=['routing']
  )
  real = batch['targets_mask']
  nll, losses = minimised_losses(logits, batch['targets'], loss)
  lengths, weight = divisors(batch, loss.per)
  correct = (jnp.argmax(logits, axis=-1) == batch['targets']) & real
  return jnp.sum(jnp.where(real, losses / lengths, 0)), {
    'weight': weight,
    'tokens': jnp.sum(real),
    'nll': jnp.sum(jnp.where(real, nll, 0)),
    'correct': jnp.sum(correct),
    'routing': seen.get('routing', {}),
  }


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
