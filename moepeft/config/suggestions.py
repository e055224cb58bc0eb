# SPDX-License-Identifier: Apache-2.0
"""Suggestions for a mistyped flag, config key or config file."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence

from ml_collections import ConfigDict

from moepeft.config import renamed
from moepeft.config.defaults import default
from moepeft.core.ranges import nearest, shortened

# Its keys are fields of the model, which the config does not know.
_SHAPE = 'model.shape'


def keys(config: ConfigDict | None = None, prefix: str = '') -> Iterator[str]:
  """'seed', 'optimizer.name', ...: the keys of a config, of all by default."""
  config = default() if config is None else config
  for name, value in config.items():
    if isinstance(value, ConfigDict) and prefix + name != _SHAPE:
      yield from keys(value, f'{prefix}{name}.')
    else:
      yield prefix + name


def unknown_key(arg: str) -> str:
  """A sentence where an argument names a key that configs lack, else ''.

  Args:
    arg: of a command line, like '--config.stepz=3'.
  """
  name = arg.partition('=')[0].lstrip('-')
  key = name.removeprefix('config.').partition('[')[0]
  if new := renamed.message(key):
    return new
  known_keys = list(keys())
  sections = {k[:i] for k in known_keys for i, c in enumerate(k) if c == '.'}
  if name == key or key in known_keys or key.startswith(f'{_SHAPE}.'):
    return ''
  if key in sections:
    inside = ', '.join(k for k in known_keys if k.startswith(f'{key}.'))
    return f'config.{key} is a section of a config; name a key in it: {inside}'
  return no_such_key(key, known_keys)


def no_such_key(key: str, known_keys: Sequence[str]) -> str:
  """The sentence for a key that configs lack."""
  close = [f'config.{k}' for k in similar_keys(key, known_keys)]
  advice = _options(close) or '; moepeft/config/defaults.py lists all keys'
  return f'there is no config.{_short(key)}{advice}'


def wrong_type(arg: str) -> str:
  """A sentence where an argument's value is not of its key's type, else ''."""
  name, equals, value = arg.partition('=')
  if not equals:
    return ''
  key = name.lstrip('-').removeprefix('config.')
  node = default()
  for part in key.split('.'):
    node = node.get(part) if isinstance(node, ConfigDict) else None
  for kind, expected, read in _TYPES:
    if type(node) is kind:
      try:
        read(value)
      except ValueError:
        return f'config.{key} is {expected}; got {shortened(value)}'
  return ''


def _truth(text: str) -> int:
  # As absl reads them.
  return ('false', 'true', 'f', 't', '0', '1').index(text.lower())


_TYPES = (
  (bool, 'true or false', _truth),
  (int, 'a whole number', int),
  (float, 'a number', float),
)


def similar_keys(key: str, known_keys: Sequence[str]) -> list[str]:
  """The keys of the same last part, else the nearest one, if any is near."""
  last = key.rpartition('.')[2]
  same = [k for k in known_keys if k.rpartition('.')[2] == last]
  same.sort(key=lambda k: k != key)
  if same:
    return same
  close = nearest(key, known_keys)
  if not close:
    ends = {k.rpartition('.')[2]: k for k in known_keys}
    close = ends.get(nearest(last, ends), '')
  return [close] if close else []


def unknown_flag(name: str, flags: Iterable[str], has_config: bool) -> str:
  """The sentence for a flag that a command lacks.

  Args:
    flags: the names that it has.
    has_config: whether keys of a config are among its flags.
  """
  close = nearest(name, flags)
  similar = [close] if close else []
  if has_config:
    same = similar_keys(name, list(keys()))
    exact = [key for key in same if key.rpartition('.')[2] == name]
    if exact or not close:
      similar = [f'config.{key}' for key in exact or same]
  advice = _options([f'--{flag}' for flag in similar]) or '; see --help'
  return f'there is no flag --{_short(name)}{advice}'


def unknown_config(file: str, folders: Sequence[str]) -> str:
  """The sentence for a config file that does not exist.

  Args:
    folders: where configs ship; see `command.locate`.
  """
  paths = {
    os.path.relpath(path, folder)
    for folder in folders
    for path in glob.glob(f'{folder}/configs/**/*.py', recursive=True)
  }
  stems = {os.path.basename(path).removesuffix('.py'): path for path in paths}
  stem = os.path.basename(file).removesuffix('.py')
  close = nearest(file, paths) or stems.get(nearest(stem, stems), '')
  return (
    f'the config {_short(file)!r} does not exist, here or in the package'
    f'{_options([close] if close else [])}'
  )


def _options(candidates: Sequence[str]) -> str:
  return f'; did you mean {" or ".join(candidates)}?' if candidates else ''


def _short(name: str) -> str:
  return name if len(name) < 80 else f'{name[:80]}...'
