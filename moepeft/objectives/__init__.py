# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions `(apply, variables, batch, rngs) -> (sum, aux)`.

The sum is divided by aux['weight'], which depends on data alone: parts of a
batch add up to the whole. A new one is one new file and one line in
OBJECTIVES, or in COMPARED where its batches have sides or labels. What they
tell beside the loss is aux['figures'], {name: [sum, count]}.

The loop takes an `Objective`, which can do something with a batch before its
gradient: `rollout` computes arrays of each row with the policy as it is then,
part by part and without gradient, `settle` what is of the whole batch. KTO's
reference point is made so. Learning from samples fits the same two: PPO and
GRPO sample answers to the batch's prompts in `rollout` (static shapes; one
jitted program with the update) and put 'targets', their masks and the
sampling policy's log p beside the prompts; rewards come from a model there, or
from a host function by `jax.pure_callback`; `settle` makes advantages, which
are means over a prompt's group of rows; `sums` is the clipped ratio of log p
now and then, less the reference's divergence, and never samples. Several
updates of one rollout need a loop around `training.step`'s gradient and nothing
else.
"""

import functools
from collections.abc import Callable

from moepeft.objectives import (
  dpo,
  kto,
  preference_losses,
  reward,
  seq2seq,
  simpo_orpo,
)
from moepeft.objectives.cross_entropy import PLAIN, Loss
from moepeft.objectives.objective import Objective as Objective
from moepeft.objectives.preference_losses import Preference

OBJECTIVES = {'seq2seq': seq2seq.objective, 'causal': seq2seq.objective}
# Those whose batches have an encoder's side; the others are of decoders.
_OF_ENCODERS = ('seq2seq',)
# Of both, their batches with several sides or with labels.
COMPARED = {
  'dpo': dpo.objective,
  'kto': kto.objective,
  'orpo': simpo_orpo.orpo,
  'simpo': simpo_orpo.simpo,
  'reward': reward.objective,
}
# Those that measure against a reference.
REFERRING = ('dpo', 'kto')


def objective_of(
  name: str,
  loss: Loss = PLAIN,
  preference: Preference = preference_losses.PLAIN,
  reference: Callable | None = None,
) -> Objective:
  """The objective that config.objective names.

  Args:
    loss: what config.loss says, of those in OBJECTIVES.
    preference: what config.preference says, of those in COMPARED.
    reference: (variables, rows) -> log p of each target [b, t], which those
      in REFERRING need where batches do not bring it.

  Raises:
    ValueError: there is no such objective, or it has no use for the loss.
  """
  if name in OBJECTIVES:
    return Objective(functools.partial(OBJECTIVES[name], loss=loss))
  if name not in COMPARED:
    raise ValueError(
      f'config.objective is one of {", ".join(OBJECTIVES | COMPARED)}; got '
      f'{name!r}'
    )
  if loss != PLAIN:
    raise ValueError(
      f'config.loss does nothing with config.objective={name!r}, whose loss is '
      'of pairs or answers; leave it as it is by default'
    )
  sums = functools.partial(COMPARED[name], settings=preference)
  if name in REFERRING:
    sums = functools.partial(sums, reference=reference)
  if name == 'kto':
    rollout = functools.partial(kto.rollout, reference=reference)
    return Objective(sums, rollout, kto.settle)
  return Objective(sums)


def batch_kind(name: str) -> str:
  """'pair' or 'judged' for objectives of answers, else 'single'."""
  if name not in COMPARED:
    return 'single'
  return 'judged' if name == 'kto' else 'pair'


def check_model(name: str, decoder_only: bool) -> None:
  """Refuses an objective of the other kind of model.

  Raises:
    ValueError: it is.
  """
  if decoder_only and name in _OF_ENCODERS:
    raise ValueError(
      f'config.objective={name!r} is of encoder-decoders and the model is '
      "decoder-only; set it to 'causal'"
    )
  if not decoder_only and name == 'causal':
    raise ValueError(
      f'config.objective={name!r} is of decoder-only models and the model is '
      "an encoder-decoder; set it to 'seq2seq'"
    )
