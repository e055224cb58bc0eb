# SPDX-License-Identifier: Apache-2.0
"""Columns about the cost of training: FLOPs, step time and memory of a run."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.checkpoints.count_flops import flops_per_token
from moepeft.evaluation.tables.render import Cell, Column
from moepeft.evaluation.tables.run_results import RunResults
from moepeft.runs.run import Run

FORWARD = Column('forward', 'FLOPs forward', 'count')
BACKWARD = Column('backward', 'FLOPs backward', 'count')
STEP_TIME = Column('step_time', 'step time', 'share')
MEMORY = Column('memory', 'memory, MB', 'count')
COLUMNS = (FORWARD, BACKWARD, STEP_TIME, MEMORY)


def cells(entries: Sequence[RunResults]) -> dict[Any, Cell]:
  """The cells of a table's row, means over its runs; the step time in seconds.

  A base has none; time and memory are missing if a run has no metrics.

  Raises:
    ValueError: the config of a run, or its base, cannot be read.
  """
  if entries[0].is_base:
    return {}
  result = {}
  flops = flops_per_token(Run(entries[0].folder).load_config())
  if flops:
    result[FORWARD.key] = Cell(flops['forward'])
    result[BACKWARD.key] = Cell(flops['backward'])
  logged = [_logged(entry) for entry in entries]
  if all(logged):
    seconds, memory = zip(*logged, strict=True)
    result[STEP_TIME.key] = Cell(statistics.fmean(seconds))
    result[MEMORY.key] = Cell(statistics.fmean(memory) / 1e6)
  return result


def _logged(entry: RunResults) -> tuple[float, float] | None:
  """(median seconds of a step, largest memory in bytes) up to its step."""
  rows = [
    (1 / row['steps_per_s'], row['memory_bytes'])
    for row in Run(entry.folder).metrics()
    if row['step'] <= entry.step
    and row.get('steps_per_s')
    and row.get('memory_bytes')
  ]
  if not rows:
    return None
  seconds, memory = zip(*rows, strict=True)
  return statistics.median(seconds), max(memory)


def relative(
  line: Mapping[Any, Cell], reference: Mapping[Any, Cell]
) -> dict[Any, Cell]:
  """A row's cells with its step time over that of a reference."""
  result = dict(line)
  seconds = result.pop(STEP_TIME.key, None)
  if seconds and STEP_TIME.key in reference:
    ratio = seconds.value / reference[STEP_TIME.key].value
    result[STEP_TIME.key] = Cell(ratio)
  return result


def notes(reference: str) -> list[str]:
  """Footnotes on the columns.

  Args:
    reference: the label of the row that step times are over.
  """
  return [
    'FLOPs are of a token in a training step, in base and adapters: the '
    'products of matrices of the traced program.',
    'Step time is the median that the metrics of a run have, over that of '
    f'{reference}; runs on machines that differ, or do other work, cannot be '
    'compared. Memory is the largest in these metrics, of the device or, on '
    'CPU, of the process.',
  ]
