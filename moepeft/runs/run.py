# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: its file names, and functions that read them.

Importing this module does not import JAX or NumPy, so that commands which only
read a run start fast.
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

# Shapes of the entries of before.json, after.json and summary.json that
# commands read; see `untrusted.check_shape`.
_EVALUATION_SHAPE = {
  'step?': int,
  'validation_loss?': float,
  'means?': {str: float},
  'rows?': [{'group': str, 'task': str, 'templates': str, 'accuracy': float}],
}
_SUMMARY_SHAPE = {
  'method?': str,
  'semantics?': str,
  'parameters?': int,
  'seconds?': float,
}


class Run:
  """The directory of a run of moepeft.train, which need not exist yet.

  This class alone defines the names of the run's files.

  Attributes:
    path: the directory, --workdir.
    config_file, gin_file: the config, and the gin files it was made of.
    data_file: hashes of the data files.
    metrics_file: one JSON line per step; see `moepeft.runs.metrics_log`.
    before_file, after_file: evaluations before and after training.
    summary_file: written at the end of the run.
    lock_file: locked by the process that trains.
    checkpoints_dir: one directory per step.
    damaged_dir: checkpoints that could not be read.
    reference_dir: log-probabilities of a precomputed reference model.
    plots_dir: PNG files.
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
    """Whether training was started in this directory."""
    return os.path.isdir(self.checkpoints_dir)

  def latest_step(self) -> int | None:
    """The step of the latest checkpoint; None without one."""
    try:
      names = os.listdir(self.checkpoints_dir)
    except OSError:
      return None
    return max((int(name) for name in names if name.isdecimal()), default=None)

  def read_config(self) -> dict[str, Any]:
    """Reads the run's config as a nested dict.

    It may have keys that this version does not know, and lacks keys that are
    newer than the run.

    Raises:
      ValueError: there is no config, or it is damaged: it is not JSON, or the
        type of a value differs from `moepeft.config.defaults`.
    """
    if not os.path.exists(self.config_file):
      raise ValueError(
        f'{self.path!r} is no work directory of moepeft.train: it has no '
        f'{os.path.basename(self.config_file)}'
      )
    # Not finite: data.temperature may be infinite. `load_config` checks ranges.
    advice = 'copy it from another run of its command'
    from moepeft.config import renamed

    return read_object(
      *(self.config_file, _config_shape(), advice),
      finite=False,
      translate=renamed.translate_config,
    )

  def load_config(self) -> ConfigDict:
    """Loads the run's config, with defaults for missing keys.

    Raises:
      ValueError: as for `read_config`, a value is out of range, or a module of
        config.imports cannot be imported.
    """
    # Imported here, as they import all model families and JAX.
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
    """Yields the rows of the metrics log; none before the first step.

    Raises:
      ValueError: a line is not a row; see `metrics_log.stream`.
    """
    return metrics_log.stream(self.metrics_file)

  def before(self) -> dict[str, Any]:
    """The evaluation before training; {} if there is none.

    Raises:
      ValueError: the file is damaged.
    """
    return _read_optional(self.before_file, _EVALUATION_SHAPE)

  def after(self) -> dict[str, Any]:
    """The evaluation after training; see `before`."""
    return _read_optional(self.after_file, _EVALUATION_SHAPE)

  def evaluation(self) -> dict[str, Any]:
    """The summary of moepeft.evaluate on held-out rows; see `before`."""
    return _read_optional(self.evaluation_file(), _EVALUATION_SHAPE)

  def summary(self) -> dict[str, Any]:
    """The summary of a finished run; {} if there is none.

    Raises:
      ValueError: the file is damaged.
    """
    return _read_optional(self.summary_file, _SUMMARY_SHAPE)

  def results_files(self) -> list[str]:
    """The sorted paths of the results files of moepeft.evaluate."""
    folder = glob.escape(self.path)
    return sorted(
      file
      for pattern in ('evaluation*.jsonl', 'base*.jsonl')
      for file in glob.glob(os.path.join(folder, pattern))
    )

  def evaluation_file(self, data: str = '', of_base: bool = False) -> str:
    """The path of moepeft.evaluate's summary; its results end with .jsonl.

    Args:
      data: the name of the data; '' for the run's held-out rows.
      of_base: whether the results are the base's, not the run's.
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
  """Reads a JSON object that a run has written.

  Args:
    shape: the expected shape; see `untrusted.check_shape`.
    advice: a remedy for a damaged file, as an imperative.
    finite: whether its numbers must be finite.
    translate: applied to the object before its shape is checked.

  Raises:
    ValueError: the file is damaged; the message names it.
    OSError: the file cannot be opened.
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

  return _shape_of(json.loads(defaults.default().to_json()))


def _shape_of(value: Any) -> Any:
  """The shape of a value's types, with all keys optional."""
  if isinstance(value, Mapping):
    return {f'{key}?': _shape_of(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return list
  return type(value)
