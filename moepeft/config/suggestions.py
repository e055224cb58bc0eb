# SPDX-License-Identifier: Apache-2.0
"""Suggestions for a mistyped flag, config key or config file."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence

from ml_collections import ConfigDict

from moepeft.config import renamed
from moepeft.config.defaults import default
from moepeft.core.ranges import nearest, short_repr

# A section whose keys are fields of the model's config.
_SHAPE = 'model.shape'


def keys(config: ConfigDict | None = None, prefix: str = '') -> Iterator[str]:
  """Yields a config's keys, 'seed', 'optimizer.name', ...

  Args:
    config: the default config if None.
    prefix: put before each key.
  """
  config = default() if config is None else config
  for name, value in config.items():
    if isinstance(value, ConfigDict) and prefix + name != _SHAPE:
      yield from keys(value, f'{prefix}{name}.')
    else:
      yield prefix + name


def unknown_key(arg: str) -> str:
  """The message for an argument with an unknown config key, else ''.

  Args:
    arg: an argument of a command line, like '--config.stepz=3'.
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
    section_keys = ', '.join(k for k in known_keys if k.startswith(f'{key}.'))
    return (
      f'config.{key} is a section of a config; name a key in it: {section_keys}'
    )
  return no_such_key(key, known_keys)


def no_such_key(key: str, known_keys: Sequence[str]) -> str:
  """The message for an unknown config key."""
  similar = [f'config.{k}' for k in similar_keys(key, known_keys)]
  advice = _did_you_mean(similar) or (
    '; moepeft/config/defaults.py lists all keys'
  )
  return f'there is no config.{_shorten(key)}{advice}'


def wrong_type(arg: str) -> str:
  """The message for an argument whose value has a wrong type, else ''."""
  name, equals, value = arg.partition('=')
  if not equals:
    return ''
  key = name.lstrip('-').removeprefix('config.')
  node = default()
  for part in key.split('.'):
    node = node.get(part) if isinstance(node, ConfigDict) else None
  for value_type, expected, parse in _TYPES:
    if type(node) is value_type:
      try:
        parse(value)
      except ValueError:
        return f'config.{key} is {expected}; got {short_repr(value)}'
  return ''


def _parse_bool(text: str) -> int:
  # The spellings of absl.
  return ('false', 'true', 'f', 't', '0', '1').index(text.lower())


_TYPES = (
  (bool, 'true or false', _parse_bool),
  (int, 'a whole number', int),
  (float, 'a number', float),
)


def similar_keys(key: str, known_keys: Sequence[str]) -> list[str]:
  """The keys with the same last part, else the nearest key, if there is one."""
  name = key.rpartition('.')[2]
  same_name = [k for k in known_keys if k.rpartition('.')[2] == name]
  same_name.sort(key=lambda k: k != key)
  if same_name:
    return same_name
  similar = nearest(key, known_keys)
  if not similar:
    by_name = {k.rpartition('.')[2]: k for k in known_keys}
    similar = by_name.get(nearest(name, by_name), '')
  return [similar] if similar else []


def unknown_flag(name: str, flags: Iterable[str], has_config: bool) -> str:
  """The message for a flag that a command does not have.

  Args:
    flags: the names of the command's flags.
    has_config: whether config keys are flags of the command.
  """
  similar_flag = nearest(name, flags)
  similar = [similar_flag] if similar_flag else []
  if has_config:
    candidates = similar_keys(name, list(keys()))
    exact = [key for key in candidates if key.rpartition('.')[2] == name]
    if exact or not similar_flag:
      similar = [f'config.{key}' for key in exact or candidates]
  advice = _did_you_mean([f'--{flag}' for flag in similar]) or '; see --help'
  return f'there is no flag --{_shorten(name)}{advice}'


def unknown_config(file: str, folders: Sequence[str]) -> str:
  """The message for a config file that does not exist.

  Args:
    folders: directories with a folder of configs.
  """
  paths = {
    os.path.relpath(path, folder)
    for folder in folders
    for path in glob.glob(f'{folder}/configs/**/*.py', recursive=True)
  }
  stems = {os.path.basename(path).removesuffix('.py'): path for path in paths}
  stem = os.path.basename(file).removesuffix('.py')
  similar = nearest(file, paths) or stems.get(nearest(stem, stems), '')
  return (
    f'the config {_shorten(file)!r} does not exist, here or in the package'
    f'{_did_you_mean([similar] if similar else [])}'
  )


def _did_you_mean(candidates: Sequence[str]) -> str:
  return f'; did you mean {" or ".join(candidates)}?' if candidates else ''


def _shorten(name: str) -> str:
  return name if len(name) < 80 else f'{name[:80]}...'
