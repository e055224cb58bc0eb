# SPDX-License-Identifier: Apache-2.0
"""The directory of a sweep: its file names, and what they say of a trial."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from moepeft.config import defaults
from moepeft.core import files
from moepeft.runs.resume import flatten
from moepeft.runs.run import Run, read_object
from moepeft.sweeps.trials import Trial

# The modules that a trial runs, one after the other.
TRAIN, EVALUATE = 'moepeft.train', 'moepeft.evaluate'


class SweepDirectory:
  """The directory of a sweep, which need not exist yet.

  Attributes:
    path: the directory, --workdir.
    evaluates: whether a trial ends with moepeft.evaluate.
    config_file: the config that all trials share.
    results_file: one JSON line per trial; see `moepeft.sweeps.results`.
    script_file: the array job of --slurm.
    runs_dir: the run of each trial.
    logs_dir: the output of each trial.
    failures_dir: the error of each trial that failed.
  """

  def __init__(self, path: str, evaluates: bool = False):
    self.path, self.evaluates = path, evaluates
    self.config_file = os.path.join(path, 'sweep.json')
    self.results_file = os.path.join(path, 'results.jsonl')
    self.script_file = os.path.join(path, 'sweep.sbatch')
    self.runs_dir = os.path.join(path, 'runs')
    self.logs_dir = os.path.join(path, 'logs')
    self.failures_dir = os.path.join(path, 'failures')

  def run(self, trial: Trial) -> Run:
    return Run(os.path.join(self.runs_dir, trial.name))

  def stage(self, trial: Trial) -> str | None:
    """The module that a trial is to run next; None if it has ended."""
    run = self.run(trial)
    # Each module writes this file last.
    if not run.summary():
      return TRAIN
    if self.evaluates and not os.path.exists(run.evaluation_file()):
      return EVALUATE
    return None

  def log_file(self, *trials: Trial) -> str:
    """The output of a trial, or of the process that trains several together."""
    name = f'vmap_{trials[0].name}' if len(trials) > 1 else trials[0].name
    return os.path.join(self.logs_dir, f'{name}.log')

  def prepare(self, config: ConfigDict) -> None:
    """Makes the directories, and compares the config with the sweep's there.

    Args:
      config: of all trials, without the values of the grid.

    Raises:
      ValueError: the directory is that of a run, or of a sweep with another
        config; the grid may differ.
    """
    if Run(self.path).has_checkpoints_dir:
      raise ValueError(
        f'{self.path!r} is the work directory of a run; name another --workdir'
      )
    new_config = json.loads(config.to_json())
    if os.path.exists(self.config_file):
      advice = 'remove it, if all runs beside it are of this config'
      shape = {'config': dict}
      old_config = read_object(self.config_file, shape, advice, finite=False)[
        'config'
      ]
      # An older version lacks the newer keys, which it ran with their defaults.
      default_config = json.loads(defaults.default().to_json())
      old_values = flatten(default_config) | flatten(old_config)
      self._check_same(old_values, flatten(new_config))
    for folder in (self.runs_dir, self.logs_dir, self.failures_dir):
      os.makedirs(folder, exist_ok=True)
    files.write_text(
      self.config_file, json.dumps({'config': new_config}, indent=2)
    )

  def _check_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key in sorted(old.keys() | new.keys()):
      if old.get(key) != new.get(key):
        raise ValueError(
          f'{self.path!r} has a sweep with config.{key}={old.get(key)!r}, now '
          f'it is {new.get(key)!r}; set it back, make it a key of --grid, or '
          'name another --workdir'
        )

  @contextlib.contextmanager
  def writing_results(self) -> Iterator[None]:
    """Lets one task of an array job at a time write the results."""
    with open(f'{self.results_file}.lock', 'a') as lock:
      # Without locks on the file system, the last one writes all rows.
      with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
      yield

  def failure(self, trial: Trial) -> str:
    """The error that ended a trial, or ''."""
    path = self._failure_file(trial)
    return files.read_text(path) if os.path.exists(path) else ''

  def write_failure(self, trial: Trial, error: str) -> None:
    files.write_text(self._failure_file(trial), error)

  def forget_failure(self, trial: Trial) -> None:
    with contextlib.suppress(FileNotFoundError):
      os.remove(self._failure_file(trial))

  def _failure_file(self, trial: Trial) -> str:
    return os.path.join(self.failures_dir, f'{trial.name}.txt')
