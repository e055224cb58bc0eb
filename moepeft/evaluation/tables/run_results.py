# SPDX-License-Identifier: Apache-2.0
"""The results in a run's directory, with its settings and losses."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.data.readers import READERS
from moepeft.evaluation import results
from moepeft.evaluation.results import HELD_OUT, Result
from moepeft.peft.method_text import canonical_text
from moepeft.runs.resume import flatten
from moepeft.runs.run import Run

# The method's name in rows of the base without adapter.
BASE = 'none'
_COMMAND = 'python -m moepeft.evaluate --workdir='
# Keys of a config that decide which examples after.json is of.
_EVALUATION_KEYS = (
  'data.validation_fraction',
  'data.inputs_length',
  'data.path',
  'data.source',
  'data.split',
  'data.targets_length',
  'data.tasks',
  'data.templates',
  'evaluation.batch_size',
  'evaluation.max_examples',
  'evaluation.path',
  'evaluation.tasks',
)
# Keys of a config that change no figure, or that an entry has by itself.
_IRRELEVANT = (
  'checkpoint',
  'data.num_workers',
  'evaluation',
  'log',
  'method',
  'model.path',
  'model.remat',
  'model.scan_unroll',
  'early_stopping_patience',
  'router_collapse_threshold',
  'seed',
  'semantics',
  'sharding',
)


@dataclasses.dataclass(frozen=True)
class RunResults:
  """A run at one step, or its base without adapter.

  Attributes:
    folder: the work directory.
    method, semantics, base, seed, step: as in rows.
    base_parameters, parameters: as in rows; None where there are no rows.
    settings: {dotted key: value} of the config, what changes no figure left
      out; empty for the base.
    source: config.data.source.
    rows: of all its evaluations.
    loss: after.json's validation loss, if it is of this step.
    means: after.json's mean accuracies of groups, likewise.
    judged: {key: value} of what decides which examples those two are of.
    is_best: whether all rows are of the best checkpoint, whatever its step.
  """

  folder: str
  method: str
  semantics: str
  base: str
  base_parameters: int | None
  parameters: int | None
  seed: int
  step: int
  settings: Mapping[str, Any]
  source: str
  rows: tuple[Result, ...] = ()
  loss: float | None = None
  means: Mapping[str, float] = dataclasses.field(default_factory=dict)
  judged: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_best: bool = False

  @property
  def is_base(self) -> bool:
    return self.method == BASE

  @property
  def has_held_out(self) -> bool:
    return any(row.data == HELD_OUT for row in self.rows)

  @property
  def generates_tasks(self) -> bool:
    """Whether held-out examples are generated, so that the seed draws them."""
    reader = READERS.get(self.source)
    return reader is not None and reader.evaluates_tasks

  @property
  def budget(self) -> tuple[int, int]:
    """(steps, rows a batch); the best checkpoint is chosen of all steps."""
    steps = self.settings.get('steps', self.step) if self.is_best else self.step
    return steps, self.settings.get('batch_size', 0)

  @property
  def at(self) -> str:
    """The checkpoint, in words that runs of other seeds share."""
    return 'best checkpoint' if self.is_best else f'step {self.step:,}'


def read(folder: str, defaults: Mapping[str, Any]) -> list[RunResults]:
  """The entries of a work directory, one for each step and the base's.

  Args:
    defaults: a config's keys, nested, for those that an older run lacks.

  Raises:
    ValueError: it is no work directory, nothing was evaluated in it, two of
      its files metric the same, or a file is damaged.
  """
  run = Run(folder)
  config = flatten(defaults) | flatten(run.read_config())
  after = run.after()
  entries = [
    _run_results(folder, config, after, results_of_step)
    for results_of_step in _results_by_step(run).values()
  ]
  if entries:
    return entries
  if not after:
    raise ValueError(
      f'{folder!r} holds no evaluation; make one with {_COMMAND}{folder}, and '
      '--data=DIR for the eight sets'
    )
  return [_without_results(run, config, after)]


def _results_by_step(run: Run) -> dict[tuple, list[Result]]:
  """All rows of a folder by (method, semantics, step)."""
  groups, origin = {}, {}
  for path in run.results_files():
    for row in results.read(path):
      key = (row.method, row.semantics, row.step)
      key_of_result = (*key, row.data, row.task, row.prompt, row.metric)
      if key_of_result in origin:
        raise ValueError(
          f'{row.metric} of {row.task!r}, prompt {row.prompt!r}, is in '
          f'{origin[key_of_result]} and again in {path}; remove one of the two'
        )
      origin[key_of_result] = path
      groups.setdefault(key, []).append(row)
  return groups


def _run_results(
  folder: str,
  config: Mapping[str, Any],
  after: Mapping,
  results_of_step: Sequence[Result],
) -> RunResults:
  row = results_of_step[0]
  _check_method(folder, config, row)
  same = after.get('step') == row.step and row.method != BASE
  return RunResults(
    folder=folder,
    method=row.method,
    semantics=row.semantics,
    base=row.base,
    base_parameters=row.base_parameters,
    parameters=row.parameters,
    seed=row.seed,
    step=row.step,
    settings={} if row.method == BASE else _settings(config),
    source=config['data.source'],
    rows=tuple(results_of_step),
    loss=after.get('validation_loss') if same else None,
    means=after.get('means', {}) if same else {},
    judged={key: config[key] for key in _EVALUATION_KEYS},
    is_best=all(row.checkpoint == 'best' for row in results_of_step),
  )


def _check_method(folder: str, config: Mapping[str, Any], row: Result) -> None:
  """Raises ValueError where rows are of a run that was there before."""
  if row.method == BASE:
    return
  now = (
    canonical_text(config['method'], config['semantics']),
    config['semantics'],
  )
  if (canonical_text(row.method, row.semantics), row.semantics) != now:
    raise ValueError(
      f'{folder!r} holds rows of {row.method!r} ({row.semantics}), its run is '
      f'of {config["method"]!r} ({config["semantics"]}); evaluate it again '
      f'with {_COMMAND}{folder}, and remove the old evaluation*.jsonl'
    )


def _without_results(run: Run, config: Mapping, after: Mapping) -> RunResults:
  summary = run.summary()
  # As in rows: 'package:t5_tiny' is t5_tiny.
  path = config['model.path'].rstrip('/')
  base = os.path.basename(path).split(':')[-1] or 'random'
  return RunResults(
    folder=run.path,
    method=summary.get('method', config['method']),
    semantics=summary.get('semantics', config['semantics']),
    base=base,
    base_parameters=None,
    parameters=None,
    seed=config['seed'],
    step=after.get('step', config['steps']),
    settings=_settings(config),
    source=config['data.source'],
    loss=after.get('validation_loss'),
    means=after.get('means', {}),
    judged={key: config[key] for key in _EVALUATION_KEYS},
  )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
  beginnings = tuple(f'{key}.' for key in _IRRELEVANT)
  return {
    key: value
    for key, value in config.items()
    if not f'{key}.'.startswith(beginnings)
  }
