# SPDX-License-Identifier: Apache-2.0
"""How a command starts: flags, configs found, and errors in one sentence."""

import ast
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moepeft import gin_files, gin_flags, pages
from moepeft.core import terminal

_TRACEBACK = flags.DEFINE_bool(
  'traceback', False, 'Show where an error was raised.'
)
# What users cause; anything else is a bug and keeps its traceback.
_ERRORS = (ValueError, OSError)
_NAMES = ('--config', '-config')
# Its keys are the model's fields, which a locked config does not know.
_SHAPE = 'model_shape'
PACKAGE = os.path.dirname(os.path.abspath(__file__))


def define_config(default: str) -> flags.FlagHolder[ConfigDict]:
  """The flags --config=FILE[:values] and --config.key=value, or --gin_file."""
  gin_flags.define(flags.FLAGS)
  _show_in_help(gin_flags.NAMES)
  flags.DEFINE_multi_string(
    _SHAPE, [], 'KEY=VALUE, the same as --config.model.shape.KEY=VALUE.'
  )
  sys.argv[1:] = [
    re.sub(r'^--?config\.model\.shape\.', f'--{_SHAPE}=', arg)
    for arg in gin_flags.rewritten(sys.argv[1:])
  ]
  translated = _answered(_translate, sys.argv)
  if translated is not None:
    return _define_translated(translated)
  # As an argument rather than a default: absl reads a default at once, and
  # would meet a wrong --config.key before `run` can answer for it.
  if not any(arg.split('=')[0] in _NAMES for arg in sys.argv):
    sys.argv.insert(1, f'--config={default}')
  found = config_flags.DEFINE_config_file(
    'config',
    None,
    'A card: a file with get_config(), and values for it after a colon. Keys '
    'are changed by --config.key=value; moepeft/config.py lists them all.',
    lock_config=True,
  )
  _show_in_help(('config', _TRACEBACK.name))
  return found


def _show_in_help(names: Sequence[str]) -> None:
  # --help shows the flags of the file that is run alone; these are others'.
  for name in names:
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def gin_text() -> str:
  """The command line's gin files and overrides as one file; '' for none."""
  translated = _translate()
  return translated.text if translated else ''


def _translate() -> gin_files.Translated | None:
  folders = (PACKAGE, os.path.dirname(PACKAGE))
  return gin_flags.translate(sys.argv, folders)


def _define_translated(
  translated: gin_files.Translated,
) -> flags.FlagHolder[ConfigDict]:
  for note in translated.notes:
    print(f'gin: {note}', file=sys.stderr)
  if 'workdir' in flags.FLAGS:
    sys.argv.insert(1, f'--workdir={translated.model_dir}')
  # absl reads --config.key=value at once here.
  return _answered(
    lambda: config_flags.DEFINE_config_dict(
      'config',
      translated.config,
      'What the gin files come to, to be changed by --config.key=value.',
      lock_config=True,
    ),
    sys.argv,
  )


def locate(path: str) -> str:
  """A config's path: as given, or the one that ships with the package."""
  file, colon, values = path.partition(':')
  # In an installed package configs/ lies inside it, in a checkout beside it.
  for folder in ('', PACKAGE, os.path.dirname(PACKAGE)):
    if os.path.isfile(os.path.join(folder, file)):
      return os.path.join(folder, file) + colon + values
  return path


def run(main: Callable[[Sequence[str]], None], arguments: bool = False) -> None:
  """`absl.app.run`, with bad input answered by one sentence and exit code 2.

  Args:
    main: takes what is left of the command line, the program's name first.
    arguments: whether it takes more than options.
  """

  def safe_main(argv: Sequence[str]) -> None:
    # Libraries tell their every step at the level of information.
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1 and not arguments:
      _stop(f'unexpected argument {argv[1]!r}; options are --name=value')
    keep_programs()
    pages.keep()
    try:
      main(argv)
    except _ERRORS as e:
      if _TRACEBACK.value:
        raise
      _stop(str(e))

  app.run(safe_main, flags_parser=parse)


def keep_programs() -> None:
  """Compiled programs outlive the process (JAX_COMPILATION_CACHE_DIR)."""
  if jax.config.jax_compilation_cache_dir is None:
    path = os.path.join(os.path.expanduser('~'), '.cache', 'moepeft', 'jax')
    jax.config.update('jax_compilation_cache_dir', path)


def parse(argv: Sequence[str]) -> list[str]:
  """absl's flags of a command line; a wrong one is a sentence and exit 2."""
  argv = [_located(arg) for arg in argv]
  for arg in argv:
    _check_exists(arg)

  def read() -> list[str]:
    rest = flags.FLAGS(argv)
    for text in flags.FLAGS[_SHAPE].value if _SHAPE in flags.FLAGS else ():
      _set_shape(flags.FLAGS['config'].value, text)
    return rest

  return _answered(read, argv)


def _set_shape(config: ConfigDict, text: str) -> None:
  """Sets config.model.shape.KEY by 'KEY=VALUE'; 'rope.kind=yarn' is a key."""
  key, equals, value = text.partition('=')
  if not key or not equals:
    raise ValueError(
      f'expected --config.model.shape.KEY=VALUE; got {key!r} without a value'
    )
  try:
    typed = ast.literal_eval(value)
  except (SyntaxError, ValueError):
    typed = value
  *parents, name = key.split('.')
  with config.unlocked(), config.ignore_type():
    node = config.model.shape
    for parent in parents:
      if not isinstance(node.get(parent), ConfigDict):
        node[parent] = ConfigDict()
      node = node[parent]
    node[name] = typed


def _answered(read: Callable[[], Any], argv: Sequence[str]) -> Any:
  """What is read; a sentence and exit code 2 where the user is wrong."""
  try:
    return read()
  except (flags.Error, ValueError, OSError) as e:
    _stop(_reason(str(e)))
  except SyntaxError as e:
    _stop(f'the config {e.filename!r} is not Python (line {e.lineno}: {e.msg})')
  except (AttributeError, KeyError, TypeError) as e:
    _stop(
      _unknown(argv, str(e))
      or f'a --config option does not fit: {_reason(str(e))}'
    )


def _unknown(argv: Sequence[str], message: str) -> str:
  """The sentence for the first --config.key that the config lacks."""
  near = re.search(r'Did you mean "(\w+)"', message)
  for arg in argv:
    key = arg.partition('=')[0].lstrip('-')
    parent, _, name = key.rpartition('.')
    if parent.startswith('config') and re.match(rf'\W*{name}\b', message):
      what = f'did you mean {parent}.{near[1]}? ' if near else ''
      return f'there is no {key}; {what}moepeft/config.py lists all keys'
  return ''


def _reason(message: str) -> str:
  """The line that says it: the last, where a card's traceback is quoted."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  if 'Error whilst parsing config file' in lines[0]:
    return lines[-1].removeprefix('ValueError: ')
  return lines[0]


def _located(arg: str) -> str:
  name, equals, value = arg.partition('=')
  if name in _NAMES and equals:
    return f'{name}={locate(value)}'
  return arg


def _check_exists(arg: str) -> None:
  name, equals, value = arg.partition('=')
  if name not in _NAMES or not equals:
    return
  file = value.partition(':')[0]
  if not os.path.isfile(file):
    _stop(f'the config {file!r} does not exist, here or in the package')


def check_can_write(path: str) -> None:
  """To be asked before what costs minutes and ends in a file at `path`.

  Raises:
    ValueError: there is no folder for it, or the file cannot be written.
  """
  folder = os.path.dirname(os.path.abspath(path))
  if not os.path.isdir(folder):
    raise ValueError(f'{path!r} cannot be written: make the folder {folder!r}')
  if os.path.isdir(path):
    raise ValueError(f'{path!r} cannot be written: it is a folder; name a file')
  if not os.access(path if os.path.exists(path) else folder, os.W_OK):
    raise ValueError(f'{path!r} cannot be written: permission is denied')


def _stop(message: str) -> None:
  terminal.show(f'error: {message}', file=sys.stderr)
  sys.exit(2)
