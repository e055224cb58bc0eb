# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of the targets, for encoder-decoders."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives.cross_entropy import (
  DEFAULTS,
  CrossEntropySettings,
  consistency_losses,
  loss_divisors,
  token_nll_and_loss,
)
from moepeft.objectives.objective import ObjectiveSpec


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: CrossEntropySettings = DEFAULTS,
) -> tuple[Array, dict[str, Tree]]:
  """Sums the losses and statistics of the targets.

  All results are sums, so that microbatches add up; the loss of a batch is
  `cross_entropy.mean_loss(sum, aux)`.

  Args:
    apply: the model's `apply`.
    variables: {'params': ..., 'peft': ...}.
    batch: inputs, decoder_inputs (for encoder-decoders), targets and their
      masks; packed rows have inputs_segments and targets_segments too.
    rngs: {'dropout': key, 'router': key} in training, None in evaluation.
    settings: the settings of config.loss; in aux only 'weight' depends on them.

  Returns:
    The sum in nats, and {'weight': the divisor, a function of the batch only;
    'tokens': the number of targets without padding; 'nll': the sum of their
    -log p; 'correct': the number of targets that are the most probable token;
    'routing': router statistics of every site}.
  """
  logits, sown = apply(
    variables, batch, train=rngs is not None, rngs=rngs, mutable=['routing']
  )
  mask = batch['targets_mask']
  nll, losses = token_nll_and_loss(logits, batch['targets'], settings)
  if settings.consistency and rngs is not None:
    # Router losses and statistics are those of the first pass.
    other_rngs = {name: jax.random.fold_in(k, 1) for name, k in rngs.items()}
    other_logits, _ = apply(
      variables, batch, train=True, rngs=other_rngs, mutable=['routing']
    )
    losses += settings.consistency * consistency_losses(logits, other_logits)
  lengths, weight = loss_divisors(batch, settings.average_over)
  correct = (jnp.argmax(logits, axis=-1) == batch['targets']) & mask
  return jnp.sum(jnp.where(mask, losses / lengths, 0)), {
    'weight': weight,
    'tokens': jnp.sum(mask),
    'nll': jnp.sum(jnp.where(mask, nll, 0)),
    'correct': jnp.sum(correct),
    'routing': sown.get('routing', {}),
  }


SEQ2SEQ = ObjectiveSpec(
  loss_fn=loss_sums,
  settings=CrossEntropySettings,
  section='loss',
  architecture='encoder-decoder',
  validates_itself=False,
)
