# SPDX-License-Identifier: Apache-2.0
"""Lists the keys of a config, and writes checked config files.

python write_config.py keys [SECTION or word]
python write_config.py write FILE.py 'About it.' key=value ...
"""

import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator

from ml_collections import ConfigDict

from moepeft.agent import config_file
from moepeft.config import check as config_check
from moepeft.config import defaults as config_lib

_FUNCTION = re.compile(r'def _?(\w+)\(')
_TOP = re.compile(r'  c\.(\w+) = ')
_INNER = re.compile(r'      (\w+)=(.*?),?$')


def main(argv: list[str]) -> str:
  """Runs the command; returns its output.

  Raises:
    ValueError: an error with a message for the user.
  """
  match argv:
    case ['keys']:
      return keys('')
    case ['keys', word]:
      return keys(word)
    case ['write', name, description, *settings]:
      return write(name, description, settings)
  raise ValueError(
    "expected keys [WORD], or write FILE.py 'About it.' key=value ..."
  )


def keys(word: str) -> str:
  """Lists the keys that contain a word; '' for sections and top-level keys."""
  c = config_lib.default()
  values = dict(_flatten(c))
  if not word:
    sections = [
      key for key, value in c.items() if isinstance(value, ConfigDict)
    ]
    top = {key: value for key, value in values.items() if '.' not in key}
    return f'sections: {", ".join(sections)}\n{_format_keys(top)}'
  matches = {k: v for k, v in values.items() if k.startswith(f'{word}.')}
  matches = matches or {k: v for k, v in values.items() if word in k}
  if not matches:
    raise ValueError(
      f'no key has {word!r} in it; keys without a word lists them'
    )
  return _format_keys(matches)


def _format_keys(values: dict) -> str:
  comments_by_key = dict(_key_comments())
  return '\n'.join(
    f'{key}={value!r}'
    + (f'  # {comments_by_key[key]}' if comments_by_key.get(key) else '')
    for key, value in values.items()
  )


def _flatten(c: ConfigDict, prefix: str = '') -> Iterator[tuple[str, object]]:
  for key, value in c.items():
    if isinstance(value, ConfigDict) and len(value):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _key_comments() -> Iterator[tuple[str, str]]:
  """Yields (key, comment above it) from moepeft/config/defaults.py.

  The keys of a section are in a function of its name: _optimizer, _data, ...
  """
  section, comments = '', []
  for line in inspect.getsource(config_lib).splitlines():
    if line.strip().startswith('#'):
      comments.append(line.strip('# '))
      continue
    if function := _FUNCTION.match(line):
      section = '' if function[1] == 'default' else f'{function[1]}.'
    elif top := _TOP.match(line):
      yield top[1], ' '.join(comments)
    elif inner := _INNER.match(line):
      yield section + inner[1], ' '.join(comments)
    comments = []


def write(name: str, description: str, settings: list[str]) -> str:
  """Checks the settings, writes the file, and reads it back by parsing it."""
  config_file.check_name(name)
  if os.path.lexists(name):
    raise ValueError(f'{name} exists; choose another name')
  if (
    not description.strip()
    or not description.isprintable()
    or len(description) > 500
  ):
    raise ValueError('describe the experiment in one sentence')
  c, values = config_lib.default(), {}
  for text in settings:
    key, value = _parse_setting(c, text)
    _set(c, key, value)
    values[key] = value
  if not values:
    raise ValueError('name at least one key=value that the experiment changes')
  summary = _check(c)
  docstring = textwrap.fill(description.strip().rstrip('.') + '.', 77)
  command = f'python -m moepeft.train --config={name} --workdir=DIR'
  config = config_file.render_config(f'{docstring}\n\n{command}\n', values)
  parsed_config = config_lib.default()
  for key, value in config_file.parse_config(config).items():
    _set(parsed_config, key, value)
  if parsed_config.to_json() != c.to_json():
    raise ValueError('the written file has other values; report this bug')
  _output(name, config)
  return f'wrote {name}\n{summary}\n\n{config}'


def _output(name: str, config: str) -> None:
  """Passes the file to the agent, which checks it, or else writes it."""
  if number := os.environ.get('MOEPEFT_OUTPUT'):
    with open(int(number), 'w', encoding='utf-8', closefd=False) as file:
      file.write(f'{name}\n{config}')
  else:
    with open(name, 'x', encoding='utf-8') as file:
      file.write(config)


def _parse_setting(c: ConfigDict, text: str) -> tuple[str, object]:
  """Parses 'key=value' to the key and a value of the default's type."""
  key, equals, value = text.partition('=')
  key = key.strip().removeprefix('config.')
  if not equals:
    raise ValueError(f'expected key=value; got {text!r}')
  defaults = dict(_flatten(c))
  if key not in defaults:
    similar = [k for k in defaults if k.split('.')[-1] == key.split('.')[-1]]
    raise ValueError(
      f'there is no key {key!r}'
      + (f'; did you mean {" or ".join(similar)}?' if similar else '')
      + '; the script with `keys` lists them'
    )
  default = defaults[key]
  return key, value if isinstance(default, str) else _parse_value(
    key, value, default
  )


def _parse_value(key: str, text: str, default: object) -> object:
  try:
    value = ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
    value = {'true': True, 'false': False}.get(text.strip().lower(), text)
  if isinstance(default, float) and type(value) is int:
    try:
      value = float(value)
    except OverflowError:
      raise ValueError(f'{key} is too large for a number: {text!r}') from None
  if type(value) is not type(default):
    raise ValueError(
      f'{key} is of type {type(default).__name__}, as {default!r}; got {text!r}'
    )
  return value


def _set(c: ConfigDict, key: str, value: object) -> None:
  *parents, name = key.split('.')
  for parent in parents:
    c = c[parent]
  c[name] = value


def _check(c: ConfigDict) -> str:
  """Checks a config as training does; returns its parameter counts.

  Raises:
    ValueError: training would refuse the config.
  """
  # Imported here, as they import JAX, which takes seconds.
  from moepeft import objectives, registries
  from moepeft.checkpoints import base
  from moepeft.checkpoints.count_parameters import count
  from moepeft.checkpoints.solve_method import with_explicit_method
  from moepeft.models import decoder_only
  from moepeft.training import optimizers

  config_check.check(c, registries.BY_KEY)
  objectives.check_config(c)
  optimizers.make_optimizer(c.optimizer, c.steps)
  try:
    _, shape = base.shape(c.model)
    objectives.check_model(c.objective, decoder_only(shape))
    summary = count(with_explicit_method(c))
  except OSError as e:
    return f'not counted, as the base is not here: {e}'
  return (
    f'trains {summary["peft"]:,} parameters, {summary["percent"]} % of the '
    f'base ({summary["params"]:,})'
  )


if __name__ == '__main__':
  try:
    print(main(sys.argv[1:]))
  except ValueError as e:
    sys.exit(f'error: {e}')
