# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep, results.jsonl: a JSON object for each trial.

Every row is a function of the trial's run directory, so that a sweep that is
killed and started again has the same rows. A row has

  index, name, settings, method, run   of the trial
  status        finished, failed, left out (by --select) or unfinished
  error         of a failed trial, a sentence
  chosen, why   with --select: whether its values are the best, and the losses
  validation    {'loss': ..., 'accuracy': ...}, of held-out rows of the training
                data; other metrics of the objective
  test          {group of tasks: accuracy}, of rows that are for evaluation;
                with --evaluate those of moepeft.evaluate
  parameters    the number of trained parameters
  steps         the last step
  seconds       of the run's last start, which is all of it if it was not
                interrupted
  experts       the number of experts of all routers and layers
  dead_experts  those with at most 1 % of an even share at the last log
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from moepeft.core import files
from moepeft.runs.router_diagnosis import dead_experts
from moepeft.runs.run import Run
from moepeft.sweeps.directory import SweepDirectory
from moepeft.sweeps.trials import Trial

FINISHED, FAILED, LEFT_OUT, UNFINISHED = (
  'finished',
  'failed',
  'left out',
  'unfinished',
)
_PREFIX = 'validation_'
# The group of tasks in after.json whose rows are those of the validation loss.
_VALIDATION_GROUP = 'validation'


def read_row(directory: SweepDirectory, trial: Trial) -> dict[str, Any]:
  """The row of a trial, as its run directory is now.

  Raises:
    ValueError: a file of the run is damaged.
  """
  run = directory.run(trial)
  row = {
    'index': trial.index,
    'name': trial.name,
    'settings': dict(trial.settings),
    'method': trial.method,
    'run': run.path,
    'status': UNFINISHED,
  }
  if directory.stage(trial) is None:
    row['status'] = FINISHED
  elif error := directory.failure(trial):
    row |= {'status': FAILED, 'error': error}
  else:
    return row
  # A trial whose evaluation failed has a validation loss to choose by.
  if summary := run.summary():
    row |= _figures(run)
    # The method is that of the run, with a solved budget.
    of_summary = ('method', 'parameters', 'seconds')
    row |= {k: v for k, v in summary.items() if k in of_summary}
  return row


def write(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes the results atomically."""
  files.write_text(path, ''.join(f'{json.dumps(row)}\n' for row in rows))


def is_result(row: Mapping[str, Any]) -> bool:
  """Whether a trial is finished and, with --select, chosen."""
  return row['status'] == FINISHED and row.get('chosen') is not False


def runs_to_compare(path: str) -> list[str]:
  """The run directories of a sweep's results; [path] if it is no sweep.

  Raises:
    ValueError: the sweep has no results yet, or its file is damaged.
  """
  results_file = SweepDirectory(path).results_file
  if not os.path.exists(results_file):
    return [path]
  try:
    rows = [json.loads(x) for x in files.read_text(results_file).splitlines()]
    # Where the sweep was moved, `run` is where it was.
    names = [row['name'] for row in rows if is_result(row)]
  except (ValueError, KeyError, TypeError):
    raise ValueError(
      f'{results_file!r} is damaged; the command of the sweep writes it again'
    ) from None
  if not names:
    raise ValueError(
      f'the sweep {path!r} has no finished trial to compare; continue it'
    )
  return [os.path.join(SweepDirectory(path).runs_dir, name) for name in names]


def _figures(run: Run) -> dict[str, Any]:
  after, logged, routing, step = run.after(), {}, {}, 0
  for row in run.metrics():
    logged = {k: v for k, v in row.items() if k.startswith(_PREFIX)} or logged
    routing, step = row.get('routing') or routing, row['step']
  measured = {k: v for k, v in after.items() if k.startswith(_PREFIX)} or logged
  validation = {k.removeprefix(_PREFIX): v for k, v in measured.items()}
  test = dict((run.evaluation() or after).get('means', {}))
  if _VALIDATION_GROUP in test:
    validation['accuracy'] = test.pop(_VALIDATION_GROUP)
  figures = {
    'validation': validation,
    'test': test,
    'steps': after.get('step', step),
  }
  dead, total = dead_experts(routing)
  return figures | ({'experts': total, 'dead_experts': dead} if total else {})
