# SPDX-License-Identifier: Apache-2.0
"""Reads the results in a run's directory, with its settings and losses."""

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

# `Result.method` of the base without adapter.
BASE = 'none'
_COMMAND = 'python -m moepeft.evaluate --workdir='
# Config keys that select the examples of after.json.
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
# Config keys that do not affect results, or are attributes of RunResults.
_IGNORED_KEYS = (
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
  'solved_from',
)


@dataclasses.dataclass(frozen=True)
class RunResults:
  """Results of a run at one step, or of its base without adapter.

  Attributes:
    folder: the work directory.
    method, semantics, base, seed, step: see `results.EvalInfo`.
    base_parameters, parameters: see `results.EvalInfo`; None without results.
    settings: dotted config key -> value, of the keys that may affect results;
      empty for the base.
    source: config.data.source.
    rows: the results of all evaluations.
    loss: after.json's validation loss, if it is of this step.
    means: after.json's mean accuracies of task groups, if they are of this
      step.
    evaluation_config: config key -> value, of the keys that select the
      examples of after.json.
    is_best: whether all results are of the best checkpoint.
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
  evaluation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_best: bool = False

  @property
  def is_base(self) -> bool:
    return self.method == BASE

  @property
  def has_held_out(self) -> bool:
    return any(row.data == HELD_OUT for row in self.rows)

  @property
  def generates_tasks(self) -> bool:
    """Whether held-out examples are generated, and so depend on the seed."""
    reader = READERS.get(self.source)
    return reader is not None and reader.evaluates_tasks

  @property
  def budget(self) -> tuple[int, int]:
    """(steps, batch size); the best checkpoint is selected from all steps."""
    steps = self.settings.get('steps', self.step) if self.is_best else self.step
    return steps, self.settings.get('batch_size', 0)

  @property
  def checkpoint_label(self) -> str:
    """A label of the checkpoint, the same for all seeds."""
    return 'best checkpoint' if self.is_best else f'step {self.step:,}'


def read(folder: str, defaults: Mapping[str, Any]) -> list[RunResults]:
  """Reads a work directory: an entry for each step, and for the base.

  Args:
    defaults: a nested config with values of keys that an older run lacks.

  Raises:
    ValueError: it is not a work directory, it has no evaluation, two of its
      files have the same result, or a file is damaged.
  """
  run = Run(folder)
  config = flatten(defaults) | flatten(run.read_config())
  after = run.after()
  entries = [
    _with_results(folder, config, after, step_results)
    for step_results in _results_by_step(run).values()
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
  """All results of a run by (method, semantics, step)."""
  groups, result_files = {}, {}
  for path in run.results_files():
    for row in results.read(path):
      key = (row.method, row.semantics, row.step)
      result_key = (*key, row.data, row.task, row.prompt, row.metric)
      if result_key in result_files:
        raise ValueError(
          f'{row.metric} of {row.task!r}, prompt {row.prompt!r}, is in '
          f'{result_files[result_key]} and again in {path}; remove one of '
          'the two'
        )
      result_files[result_key] = path
      groups.setdefault(key, []).append(row)
  return groups


def _with_results(
  folder: str,
  config: Mapping[str, Any],
  after: Mapping,
  step_results: Sequence[Result],
) -> RunResults:
  row = step_results[0]
  _check_method(folder, config, row)
  has_after = after.get('step') == row.step and row.method != BASE
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
    rows=tuple(step_results),
    loss=after.get('validation_loss') if has_after else None,
    means=after.get('means', {}) if has_after else {},
    evaluation_config={key: config[key] for key in _EVALUATION_KEYS},
    is_best=all(row.checkpoint == 'best' for row in step_results),
  )


def _check_method(folder: str, config: Mapping[str, Any], row: Result) -> None:
  """Raises ValueError if a result is of an earlier run in the directory."""
  if row.method == BASE:
    return
  expected = canonical_text(config['method'], config['semantics'])
  method = canonical_text(row.method, row.semantics)
  if (method, row.semantics) != (expected, config['semantics']):
    raise ValueError(
      f'{folder!r} holds rows of {row.method!r} ({row.semantics}), its run is '
      f'of {config["method"]!r} ({config["semantics"]}); evaluate it again '
      f'with {_COMMAND}{folder}, and remove the old evaluation*.jsonl'
    )


def _without_results(run: Run, config: Mapping, after: Mapping) -> RunResults:
  summary = run.summary()
  # As in results, 'package:t5_tiny' is named t5_tiny.
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
    evaluation_config={key: config[key] for key in _EVALUATION_KEYS},
  )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
  prefixes = tuple(f'{key}.' for key in _IGNORED_KEYS)
  return {
    key: value
    for key, value in config.items()
    if not f'{key}.'.startswith(prefixes)
  }
