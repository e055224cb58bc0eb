# SPDX-License-Identifier: Apache-2.0
"""Lists the keys of a config, and writes config files that are checked.

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
  """Does what is asked and tells it.

  Raises:
    ValueError: it cannot be done, a sentence.
  """
  match argv:
    case ['keys']:
      return keys('')
    case ['keys', word]:
      return keys(word)
    case ['write', name, about, *settings]:
      return write(name, about, settings)
  raise ValueError(
    "expected keys [WORD], or write FILE.py 'About it.' key=value ..."
  )


def keys(word: str) -> str:
  """The sections and the top's keys, or the keys that a word is in."""
  c = config_lib.default()
  values = dict(_flat(c))
  if not word:
    sections = [
      key for key, value in c.items() if isinstance(value, ConfigDict)
    ]
    top = {key: value for key, value in values.items() if '.' not in key}
    return f'sections: {", ".join(sections)}\n{_listed(top)}'
  chosen = {k: v for k, v in values.items() if k.startswith(f'{word}.')}
  chosen = chosen or {k: v for k, v in values.items() if word in k}
  if not chosen:
    raise ValueError(
      f'no key has {word!r} in it; keys without a word lists them'
    )
  return _listed(chosen)


def _listed(values: dict) -> str:
  about = dict(_remarks())
  return '\n'.join(
    f'{key}={value!r}' + (f'  # {about[key]}' if about.get(key) else '')
    for key, value in values.items()
  )


def _flat(c: ConfigDict, prefix: str = '') -> Iterator[tuple[str, object]]:
  for key, value in c.items():
    if isinstance(value, ConfigDict) and len(value):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _remarks() -> Iterator[tuple[str, str]]:
  """(key, the comment above it) as moepeft/config/defaults.py has them.

  A section's keys stand in a function of its name: _optimizer, _data, ...
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


def write(name: str, about: str, settings: list[str]) -> str:
  """Checks the settings, writes the file, and reads it back by parsing it."""
  config_file.check_name(name)
  if os.path.lexists(name):
    raise ValueError(f'{name} exists; choose another name')
  if not about.strip() or not about.isprintable() or len(about) > 500:
    raise ValueError('say in a plain sentence what the experiment is')
  c, changed = config_lib.default(), {}
  for text in settings:
    key, value = _read(c, text)
    _set(c, key, value)
    changed[key] = value
  if not changed:
    raise ValueError('name at least one key=value that the experiment changes')
  counted = _check(c)
  sentence = textwrap.fill(about.strip().rstrip('.') + '.', 77)
  command = f'python -m moepeft.train --config={name} --workdir=DIR'
  config = config_file.render_config(f'{sentence}\n\n{command}\n', changed)
  again = config_lib.default()
  for key, value in config_file.parse_config(config).items():
    _set(again, key, value)
  if again.to_json() != c.to_json():
    raise ValueError('the file does not say what was asked; report this')
  _hand_over(name, config)
  return f'wrote {name}\n{counted}\n\n{config}'


def _hand_over(name: str, config: str) -> None:
  """To the agent, which looks at it and writes it; to a file without one."""
  if number := os.environ.get('MOEPEFT_OUTPUT'):
    with open(int(number), 'w', encoding='utf-8', closefd=False) as file:
      file.write(f'{name}\n{config}')
  else:
    with open(name, 'x', encoding='utf-8') as file:
      file.write(config)


def _read(c: ConfigDict, text: str) -> tuple[str, object]:
  """'key=value' as the key and a value of the default's type."""
  key, equals, value = text.partition('=')
  key = key.strip().removeprefix('config.')
  if not equals:
    raise ValueError(f'expected key=value; got {text!r}')
  keys_ = dict(_flat(c))
  if key not in keys_:
    near = [k for k in keys_ if k.split('.')[-1] == key.split('.')[-1]]
    raise ValueError(
      f'there is no key {key!r}'
      + (f'; did you mean {" or ".join(near)}?' if near else '')
      + '; the script with `keys` lists them'
    )
  like = keys_[key]
  return key, value if isinstance(like, str) else _typed(key, value, like)


def _typed(key: str, text: str, like: object) -> object:
  try:
    value = ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
    value = {'true': True, 'false': False}.get(text.strip().lower(), text)
  if isinstance(like, float) and type(value) is int:
    try:
      value = float(value)
    except OverflowError:
      raise ValueError(f'{key} is too large for a number: {text!r}') from None
  if type(value) is not type(like):
    raise ValueError(
      f'{key} is of type {type(like).__name__}, as {like!r}; got {text!r}'
    )
  return value


def _set(c: ConfigDict, key: str, value: object) -> None:
  *parents, name = key.split('.')
  for parent in parents:
    c = c[parent]
  c[name] = value


def _check(c: ConfigDict) -> str:
  """Looks at the config as training would, and counts what it trains.

  Raises:
    ValueError: training would refuse it.
  """
  # Here, as `keys` does without them and JAX takes seconds to start.
  from moepeft import objectives, registries
  from moepeft.checkpoints import base
  from moepeft.checkpoints.count_parameters import count
  from moepeft.models import decoder_only
  from moepeft.training import optimizers

  config_check.check(c, registries.BY_KEY)
  objectives.check_config(c)
  optimizers.make_optimizer(c.optimizer, c.steps)
  try:
    _, shape = base.shape(c.model)
    objectives.check_model(c.objective, decoder_only(shape))
    counted = count(c)
  except OSError as e:
    return f'not counted, as the base is not here: {e}'
  return (
    f'trains {counted["peft"]:,} parameters, {counted["percent"]} % of the '
    f'base ({counted["params"]:,})'
  )


if __name__ == '__main__':
  try:
    print(main(sys.argv[1:]))
  except ValueError as e:
    sys.exit(f'error: {e}')
