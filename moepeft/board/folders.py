# SPDX-License-Identifier: Apache-2.0
"""The folders of a board, and the paths that requests may name in them."""

import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.core import files
from moepeft.core.ranges import short_repr
from moepeft.runs.run import Run

# Keys of a config that may be paths.
_PATH_KEYS = (
  *('model.path', 'model.adapter', 'data.path', 'data.templates'),
  *('data.tokenizer', 'data.chat_template', 'data.replay'),
  *('evaluation.path', 'preference.reference'),
)
_NEW_NAME = re.compile(r'[A-Za-z0-9][\w.+-]{0,99}', re.ASCII)
# A name on the hub or in the package, or a word such as 'bytes'.
_HUB_NAME = re.compile(r'[\w][\w.-]*(/[\w][\w.-]*)?', re.ASCII)
# Directories between the folder of the runs and a run.
_MAX_DEPTH = 3


class Folders:
  """The folder of the runs, and others that runs may read.

  Attributes:
    workdirs: the absolute path of the folder of the runs.
  """

  def __init__(self, workdirs: str, data: Sequence[str] = ()):
    """
    Args:
      data: folders of data and models.
    """
    self._roots = [
      os.path.realpath(os.path.expanduser(path)) for path in (workdirs, *data)
    ]
    self.workdirs = self._roots[0]

  @property
  def board(self) -> str:
    """The folder of the board's own files: configs, jobs and their logs."""
    return os.path.join(self.workdirs, '.board')

  def names(self) -> Iterator[str]:
    """Yields the names of the runs, paths from the folder of the runs."""
    for folder, subfolders, _ in os.walk(self.workdirs):
      subfolders[:] = sorted(s for s in subfolders if not s.startswith('.'))
      name = os.path.relpath(folder, self.workdirs)
      if name == os.curdir:
        continue
      if self._is_run(name):
        yield name
        subfolders.clear()
      elif name.count(os.sep) + 1 >= _MAX_DEPTH:
        subfolders.clear()

  def run(self, name: str) -> Run:
    """The run of a name.

    Raises:
      ValueError: there is no such run below the folder of the runs.
    """
    path = self._path(name)
    if path is None or not self._is_run(name):
      raise ValueError(f'there is no run {short_repr(name)} in this board')
    return Run(path)

  def new_run(self, name: str) -> Run:
    """The directory of a run that is to be started.

    A start that failed before its first step may be repeated.

    Raises:
      ValueError: the name is none for a directory, or there is one already.
    """
    path = self._path(name) if _NEW_NAME.fullmatch(name) else None
    if path is None:
      raise ValueError(
        f'{short_repr(name)} is no name for a run; use up to 100 letters, '
        'digits, dots, hyphens and underscores, and begin with a letter or a '
        'digit'
      )
    run = Run(path)
    is_failed_start = os.path.exists(self.card(name)) and not (
      run.has_checkpoints_dir or os.path.exists(run.metrics_file)
    )
    if os.path.lexists(path) and not is_failed_start:
      raise ValueError(
        f'there is already a directory {name!r}; resume that run, or use '
        'another name'
      )
    return run

  def card(self, name: str) -> str:
    """The path of the config that the board starts a run with."""
    return os.path.join(self.board, 'configs', f'{quote(name, safe="")}.py')

  def check_paths(self, config: ConfigDict) -> None:
    """Checks that the paths in a config are below the folders of the board.

    Names on the hub and of the package's files are no paths.

    Raises:
      ValueError: a path is outside of them; the message names the key.
    """
    for key in _PATH_KEYS:
      self._check_path(f'config.{key}', config_path.get_value(key, config))
    for spec in method_string.parse_method(config.method):
      for path in _adapter_paths(spec):
        self._check_path('from_adapters', path)

  def relative(self, path: str) -> str:
    """A path as it is shown: from the current directory where it is below."""
    short = os.path.relpath(path)
    return path if short.startswith(os.pardir) else short

  def _path(self, name: str) -> str | None:
    """The directory of a name, which need not exist; None for one outside."""
    parts = name.split('/')
    if '\0' in name or any(not p or p.startswith('.') for p in parts):
      return None
    path = os.path.join(self.workdirs, *parts)
    # A link must not lead to another place.
    return path if os.path.realpath(path) == path else None

  def _is_run(self, name: str) -> bool:
    run = Run(os.path.join(self.workdirs, name))
    if not os.path.isdir(run.path):
      return False
    has_started = any(map(os.path.exists, (run.metrics_file, run.lock_file)))
    is_configured = os.path.exists(run.config_file)
    return (has_started and is_configured) or os.path.exists(self.card(name))

  def _check_path(self, key: str, value: str) -> None:
    if not value or value.startswith('package:'):
      files.local_path(value)
      return
    path = os.path.expanduser(value)
    is_plain = not set('\0*?[') & set(value)
    if is_plain and not os.path.lexists(path) and _HUB_NAME.fullmatch(value):
      return
    if not is_plain or not self._is_inside(os.path.realpath(path)):
      raise ValueError(
        f'{key}={short_repr(value)} is outside of the folders of this board; '
        'name a path in one of them, or start the board with --data=FOLDER'
      )

  def _is_inside(self, path: str) -> bool:
    def is_below(folder: str) -> bool:
      return os.path.commonpath([folder, path]) == folder

    return any(map(is_below, self._roots)) and not is_below(self.board)


def _adapter_paths(spec: Spec) -> Iterator[str]:
  """Yields the paths in the options from_adapters of a method."""
  for key, value in spec.options:
    for part in value if isinstance(value, list | tuple) else [value]:
      if isinstance(part, Spec):
        yield from _adapter_paths(part)
      elif key == 'from_adapters':
        yield str(part)
