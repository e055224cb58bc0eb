# SPDX-License-Identifier: Apache-2.0
"""Settings of a form: made a config, checked, and written as a config file."""

import functools
import math
import os
import runpy
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from moepeft.config import command_line, default, suggestions
from moepeft.core.ranges import short_repr
from moepeft.core.untrusted import parse_literal
from moepeft.runs.run import Run

# They name code to run, or are written by a run.
_REFUSED = ('imports', 'callbacks', 'solved_from')
# Sections whose keys the default config does not list.
_OPEN_SECTIONS = ('model.shape', 'router_losses')
# The spellings of absl.
_TRUE = ('true', 't', '1')


def make_config(settings: Mapping[str, str]) -> ConfigDict:
  """The default config with the settings of a form, {key: text of its value}.

  Raises:
    ValueError: there is no such key, or its value has another type.
  """
  config = default()
  known_keys = list(suggestions.keys())
  for key, text in settings.items():
    if key in _REFUSED:
      raise ValueError(
        f'config.{key} cannot be set on the board; start such a run in a '
        'terminal'
      )
    if key.startswith(tuple(f'{section}.' for section in _OPEN_SECTIONS)):
      _set_open(config, key, text)
    elif key in known_keys and key not in _OPEN_SECTIONS:
      usual = config_path.get_value(key, config)
      config_path.set_value(key, config, _parse(key, text, usual))
    else:
      raise ValueError(suggestions.no_such_key(key, known_keys))
  return config


def _parse(key: str, text: str, usual: Any) -> Any:
  """The value of a key, of the type of its usual value."""
  if isinstance(usual, str):
    return text
  text = text.strip()
  if error := suggestions.wrong_type(f'--config.{key}={text}'):
    raise ValueError(error)
  if isinstance(usual, bool):
    return text.lower() in _TRUE
  if isinstance(usual, int | float):
    return type(usual)(text)
  value = parse_literal(text)
  if type(value) is not type(usual):
    raise ValueError(
      f'config.{key} is written like {usual!r}; got {short_repr(text)}'
    )
  return value


def _set_open(config: ConfigDict, key: str, text: str) -> None:
  """Sets a key of an open section; a value that is no literal is a text."""
  try:
    value = parse_literal(text)
  except ValueError:
    value = text
  *parents, name = key.split('.')
  for parent in parents:
    if parent not in config:
      config[parent] = ConfigDict()
    config = config[parent]
    if not isinstance(config, ConfigDict):
      raise ValueError(f'config.{key}: {parent} is set to a value; keep one')
  with config.ignore_type():
    config[name] = value


def stored_config(run: Run) -> ConfigDict:
  """The config of a run, without importing the modules that it names.

  Raises:
    ValueError: as `Run.read_config`.
  """
  config = default()
  with config.unlocked():
    config.update(run.read_config())
  return config


def differences(config: ConfigDict) -> dict[str, Any]:
  """{key: value} of the keys that differ from the default config.

  An open section that differs is one value.
  """
  usual = dict(_flatten(default()))
  return {
    key: value
    for key, value in _flatten(config)
    if key not in usual or usual[key] != value
  }


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    key = f'{prefix}{name}'
    if not isinstance(value, ConfigDict):
      yield key, value
    elif key in _OPEN_SECTIONS:
      yield key, value.to_dict()
    else:
      yield from _flatten(value, f'{key}.')


def texts(values: Mapping[str, Any]) -> dict[str, str]:
  """Values as the form shows them, and as `make_config` reads them."""
  result = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      result |= texts({f'{key}.{name}': item for name, item in value.items()})
    else:
      result[key] = value if isinstance(value, str) else repr(value)
  return result


def defaults() -> dict[str, str]:
  """`texts` of the default config."""
  return texts(dict(_flatten(default())))


def render(config: ConfigDict) -> str:
  """A config file, in the form of configs/, that returns the config.

  Raises:
    ValueError: the config has a key that the default config lacks.
  """
  lines = []
  known_keys = {*suggestions.keys(), *_OPEN_SECTIONS}
  for key, value in differences(config).items():
    if key not in known_keys:
      # Its name may be anything, and the file is run.
      raise ValueError(suggestions.no_such_key(key, sorted(known_keys)))
    if key in _OPEN_SECTIONS:
      lines.append(f'  c.{key}.update({value!r})')
    elif isinstance(value, float) and not math.isfinite(value):
      lines.append(f"  c.{key} = float('{value}')")
    else:
      lines.append(f'  c.{key} = {value!r}')
  head = (
    '"""Written by python -m moepeft.board."""\n\n'
    'from moepeft import config as config_lib\n\n\n'
    'def get_config():\n  c = config_lib.default()'
  )
  return '\n'.join([head, *lines, '  return c', ''])


@functools.cache
def preset_files() -> dict[str, str]:
  """{name: path} of the config files that ship, 'methods/mov' of configs/."""
  # configs/ is in an installed package, and beside the package in a checkout.
  for parent in (command_line.PACKAGE, os.path.dirname(command_line.PACKAGE)):
    folder = os.path.join(parent, 'configs')
    if os.path.isdir(folder):
      return {
        os.path.relpath(os.path.join(place, name), folder)[:-3]: os.path.join(
          place, name
        )
        for place, _, names in sorted(os.walk(folder))
        for name in sorted(names)
        if name.endswith('.py') and not name.startswith('_')
      }
  return {}


def preset(name: str) -> dict[str, Any]:
  """`differences` of a config that ships.

  Raises:
    ValueError: there is none of this name.
  """
  files = preset_files()
  if name not in files:
    raise ValueError(
      f'there is no config {short_repr(name)}; there are {", ".join(files)}'
    )
  return differences(runpy.run_path(files[name])['get_config']())
