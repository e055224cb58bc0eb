# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of the trained tokens of a decoder-only model's rows:
pretraining where all are trained, fine-tuning where the answers are."""

from collections.abc import Callable

from moepeft.core.types import Array, Batch, Tree
from moepeft.objectives import seq2seq
from moepeft.objectives.cross_entropy import PLAIN, Loss


def objective(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  loss: Loss = PLAIN,
) -> tuple[Array, dict[str, Tree]]:
  """The sum of the trained tokens' losses, and what was seen on the way.

  Args:
    apply: the model's `apply`.
    variables: {'params': ..., 'peft': ...}.
    batch: inputs int [b, t], targets (the token that follows each),
      targets_mask (True on what is trained) and inputs_mask; packed rows have
      inputs_segments, targets_segments and inputs_positions too.
    rngs, loss: as of `seq2seq.objective`.

  Returns:
    As `seq2seq.objective`: the tokens are the trained ones.
  """
  return seq2seq.objective(apply, variables, batch, rngs, loss)
