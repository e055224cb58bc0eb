# SPDX-License-Identifier: Apache-2.0
"""Columns about the cost of training, from the traced and compiled step."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.checkpoints.count_flops import flops_per_token
from moepeft.evaluation import step_cost
from moepeft.evaluation.tables.render import Cell, Column

FORWARD = Column('forward', 'FLOPs forward', 'count')
BACKWARD = Column('backward', 'FLOPs backward', 'count')
STEP_TIME = Column('step_time', 'step time', 'share')
MEMORY = Column('memory', 'memory, MB', 'count')
COLUMNS = (FORWARD, BACKWARD, STEP_TIME, MEMORY)
_ROUNDS = 5


def measure(
  configs: Mapping[int, ConfigDict], reference: int
) -> dict[int, dict[Any, Cell]]:
  """{row: its cells}.

  Args:
    configs: {row: the config of its runs}.
    reference: the row that step times are over.

  Raises:
    ValueError: the base of a config cannot be read, or has no decoder.
  """
  reference_step = step_cost.compile_step(configs[reference])
  cells = {}
  for row, config in configs.items():
    step, ratio = reference_step, 1.0
    # Two at a time, as each has a copy of the base's size.
    if row != reference:
      step = step_cost.compile_step(config)
      ratio = step_cost.time_ratio(step, reference_step, _ROUNDS)
    cells[row] = {STEP_TIME.key: Cell(ratio)}
    if step.memory is not None:
      cells[row][MEMORY.key] = Cell(step.memory / 1e6)
    if flops := flops_per_token(config):
      cells[row][FORWARD.key] = Cell(flops['forward'])
      cells[row][BACKWARD.key] = Cell(flops['backward'])
  return cells


def notes(reference: str) -> list[str]:
  """Footnotes on the columns.

  Args:
    reference: the label of the row that step times are over.
  """
  return [
    'FLOPs are of a token in a training step, in base and adapters: the '
    'products of matrices of the traced program.',
    'Step time and memory are of the compiled step, loss and gradients without '
    'optimizer, here and now on a batch without padding: the time over that of '
    f'{reference}, the median of {_ROUNDS} turns, and the memory beside the '
    'weights and the batch.',
  ]
