# SPDX-License-Identifier: Apache-2.0
"""Objectives: loss functions `(apply, variables, batch, rngs) -> (sum, aux)`.

`moepeft.objectives.objective` defines their interface. To add one, write a file
and a line in OBJECTIVES; docs/extending/objective.md has an example.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from moepeft.config.check import check_entry
from moepeft.core.registry import Registry
from moepeft.objectives.objective import Objective as Objective
from moepeft.objectives.objective import ObjectiveSpec as ObjectiveSpec

OBJECTIVES: Registry = Registry(
  'objective',
  'moepeft.objectives',
  {
    'seq2seq': 'seq2seq:SEQ2SEQ',
    'causal': 'causal:CAUSAL',
    'distill': 'distill:DISTILL',
    'dpo': 'dpo:DPO',
    'kto': 'kto:KTO',
    'orpo': 'orpo:ORPO',
    'simpo': 'simpo:SIMPO',
    'reward': 'reward:REWARD',
  },
)


def check_config(config: ConfigDict) -> ObjectiveSpec:
  """Checks config.objective and the keys that objectives read.

  Raises:
    ValueError: there is no such objective, a value is out of range, or a key
      is set that this objective does not read.
  """
  check_entry(config, 'objective', OBJECTIVES)
  spec = OBJECTIVES[config.objective]
  spec.settings_from(config)
  return spec


def build_objective(
  config: ConfigDict, reference: Callable | None = None
) -> Objective:
  """Builds the objective of config.objective with the config's settings.

  Args:
    reference: result of `moepeft.objectives.reference_model.make_reference`.

  Raises:
    ValueError: as `check_config`.
  """
  spec = check_config(config)
  return spec.build(spec.settings_from(config), reference)


def build_validation_objective(
  config: ConfigDict, reference: Callable | None = None
) -> Objective:
  """Builds the objective that validation measures.

  A preference objective is validated with its own loss, and a likelihood with
  plain NLL for any config.loss, so that runs are comparable.
  """
  spec = OBJECTIVES.lookup(config.objective)
  if not spec.validates_itself:
    return spec.build()
  return build_objective(config, reference)


def check_model(name: str, decoder_only: bool) -> None:
  """Checks that an objective can train a model of this architecture.

  Args:
    name: the name of the objective.
    decoder_only: whether the model is a decoder without an encoder.

  Raises:
    ValueError: it cannot; the message lists objectives that can.
  """
  architecture = 'decoder' if decoder_only else 'encoder-decoder'
  required = OBJECTIVES.lookup(name).architecture
  if required not in ('any', architecture):
    alternatives = (
      candidate
      for candidate, spec in OBJECTIVES.items()
      if spec.architecture == architecture
    )
    raise ValueError(
      f'config.objective={name!r} trains models of the kind {required}, '
      f'and this model is of the kind {architecture}; set it to '
      f'{" or ".join(map(repr, alternatives))}'
    )
