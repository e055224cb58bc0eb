# SPDX-License-Identifier: Apache-2.0
"""A run's directory: the names of its files, and reading them.

Nothing here imports JAX or NumPy when it is imported, so that commands which
only look at a run start at once.
"""

import functools
import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.core import untrusted
from moepeft.runs import metrics_log

# Entries of before.json, after.json and summary.json that commands read.
_EVALUATION = {
  'step?': int,
  'validation_loss?': float,
  'means?': {str: float},
  'rows?': [{'group': str, 'task': str, 'templates': str, 'accuracy': float}],
}
_SUMMARY = {'method?': str, 'semantics?': str}


class Run:
  """The directory of a run of moepeft.train, which need not exist yet.

  No other code knows the names of its files.

  Attributes:
    path: the directory, --workdir.
    config_file, gin_file: the config, and the gin files that it is from.
    data_file: hashes of the data's files.
    metrics_file: a JSON line a step; see `moepeft.runs.metrics_log`.
    before_file, after_file: evaluations before and after training.
    summary_file: written when a run ends.
    lock_file: held by the process that trains.
    checkpoints_dir, damaged_dir: a folder a step, those that could not be
      read in the second.
    reference_dir: log-probabilities of a precomputed reference model.
    plots_dir: PNGs.
    profile_dir: a trace of JAX's profiler.
  """

  def __init__(self, path: str):
    self.path = path
    self.config_file = os.path.join(path, 'config.json')
    self.gin_file = os.path.join(path, 'config.gin')
    self.data_file = os.path.join(path, 'data.json')
    self.metrics_file = os.path.join(path, 'metrics.jsonl')
    self.before_file = os.path.join(path, 'before.json')
    self.after_file = os.path.join(path, 'after.json')
    self.summary_file = os.path.join(path, 'summary.json')
    self.lock_file = os.path.join(path, 'lock')
    self.checkpoints_dir = os.path.join(path, 'checkpoints')
    self.damaged_dir = os.path.join(path, 'damaged')
    self.reference_dir = os.path.join(path, 'reference')
    self.plots_dir = os.path.join(path, 'plots')
    self.profile_dir = os.path.join(path, 'profile')

  @property
  def has_checkpoints_dir(self) -> bool:
    """Whether training in this directory ever began."""
    return os.path.isdir(self.checkpoints_dir)

  def latest_step(self) -> int | None:
    """The step of the latest checkpoint; None without one."""
    try:
      names = os.listdir(self.checkpoints_dir)
    except OSError:
      return None
    return max((int(name) for name in names if name.isdecimal()), default=None)

  def read_config(self) -> dict[str, Any]:
    """The config that the run was begun with, nested.

    Keys that this version does not have are kept, and those that an older run
    lacks are absent.

    Raises:
      ValueError: there is none, or it is damaged: no JSON, or a key's value is
        of another type than in `moepeft.config.defaults`.
    """
    if not os.path.exists(self.config_file):
      raise ValueError(
        f'{self.path!r} is no work directory of moepeft.train: it has no '
        f'{os.path.basename(self.config_file)}'
      )
    # data.temperature may be infinite; `load_config` checks all ranges.
    advice = 'copy it from another run of its command'
    from moepeft.config import renamed

    return read_object(
      *(self.config_file, _config_shape(), advice),
      finite=False,
      translate=renamed.translated,
    )

  def load_config(self) -> ConfigDict:
    """The same as a config, with the defaults for absent keys.

    Raises:
      ValueError: as `read_config`, a value is none that training takes, or a
        module of config.imports cannot be imported.
    """
    # Imports every model family, and with them JAX.
    from moepeft.config import check, defaults, imports

    config = defaults.default()
    with config.unlocked():
      config.update(self.read_config())
    try:
      imports.import_modules(config.imports)
      check.check_ranges(config)
    except ValueError as e:
      raise ValueError(f'{self.config_file}: {e}') from None
    return config

  def metrics(self) -> Iterator[dict[str, Any]]:
    """The rows of the metrics log, one by one; none before the first step.

    Raises:
      ValueError: a line is no row; see `metrics_log.stream`.
    """
    return metrics_log.stream(self.metrics_file)

  def before(self) -> dict[str, Any]:
    """The evaluation before training; {} where there was none.

    Raises:
      ValueError: the file is damaged.
    """
    return _read_optional(self.before_file, _EVALUATION)

  def after(self) -> dict[str, Any]:
    """The evaluation after training, likewise."""
    return _read_optional(self.after_file, _EVALUATION)

  def summary(self) -> dict[str, Any]:
    """The summary of a run that has ended, likewise."""
    return _read_optional(self.summary_file, _SUMMARY)

  def results_files(self) -> list[str]:
    """Files of results that moepeft.evaluate has written here, by name."""
    folder = glob.escape(self.path)
    return sorted(
      file
      for pattern in ('evaluation*.jsonl', 'base*.jsonl')
      for file in glob.glob(os.path.join(folder, pattern))
    )

  def evaluation_file(self, data: str = '', of_base: bool = False) -> str:
    """The file of moepeft.evaluate's summary, with results beside it as .jsonl.

    Args:
      data: the name of other data than the run's own held-out rows.
      of_base: the base's results must not take the place of the run's.
    """
    name = 'base' if of_base else 'evaluation'
    return os.path.join(self.path, f'{name}{data and f"_{data}"}.json')


def read_object(
  path: str,
  shape: Any,
  advice: str,
  finite: bool = True,
  translate: Callable[[dict], dict] = lambda value: value,
) -> dict[str, Any]:
  """A JSON object that a run has written.

  Args:
    shape: see `untrusted.check_shape`.
    advice: a remedy for a damaged file, as an imperative.
    finite: whether its numbers have to be.
    translate: applied before the shape is checked.

  Raises:
    ValueError: it is damaged; the message names the file.
    OSError: it cannot be opened.
  """
  try:
    value = translate(untrusted.read_json_object(path))
    untrusted.check_shape(value, shape, finite=finite)
  except untrusted.Malformed as e:
    reason = str(e).removeprefix(f'{path} ').removesuffix('; copy it again')
    raise ValueError(f'{path} is damaged ({reason}); {advice}') from None
  return value


def _read_optional(path: str, shape: Any) -> dict[str, Any]:
  if not os.path.exists(path):
    return {}
  return read_object(path, shape, 'remove it to go on without it')


@functools.cache
def _config_shape() -> dict[str, Any]:
  from moepeft.config import defaults

  return _shape(json.loads(defaults.default().to_json()))


def _shape(value: Any) -> Any:
  """The shape of a config that has the types of another, all keys optional."""
  if isinstance(value, Mapping):
    return {f'{key}?': _shape(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return list
  return type(value)
