# SPDX-License-Identifier: Apache-2.0
"""The start of a command: flags, configs found, and errors in one sentence."""

import io
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moepeft.config import check as config_check
from moepeft.config import gin as gin_files
from moepeft.config import imports, suggestions
from moepeft.config.gin import flags as gin_flags
from moepeft.core import host_memory, secrets, terminal
from moepeft.core.memory import is_out_of_memory
from moepeft.core.untrusted import parse_literal

_TRACEBACK = flags.DEFINE_bool(
  'traceback', False, 'Show where an error was raised.'
)
_IMPORTS = flags.DEFINE_string(
  'imports',
  '',
  'Modules to import first, my_module,other: they register methods, routers, '
  'objectives and other entries of their own (docs/extending). A run keeps '
  'their names, and commands that read it import them too.',
)
# Caused by users; anything else is a bug and keeps its traceback.
_ERRORS = (ValueError, OSError)
_HELP = ('help', 'helpshort', 'helpfull', 'helpxml', '?', 'h')
_NAMES = ('--config', '-config')
# Sections of a config whose keys entries or models define, which a locked
# config does not know, by the flag that sets one key of them.
_OPEN_SECTIONS = {'model_shape': 'model.shape', 'router_loss': 'router_losses'}
PACKAGE = str(pathlib.Path(__file__).resolve().parents[1])


def define_config(default: str) -> flags.FlagHolder[ConfigDict]:
  """The flags --config=FILE[:values] and --config.key=value, or --gin_file."""
  gin_flags.define(flags.FLAGS)
  _show_in_help(gin_flags.NAMES)
  for name, section in _OPEN_SECTIONS.items():
    flags.DEFINE_multi_string(
      name, [], f'KEY=VALUE, the same as --config.{section}.KEY=VALUE.'
    )
  sys.argv[1:] = rewritten(sys.argv[1:])
  translated = _answered(_translate, sys.argv)
  if translated is not None:
    return _define_translated(translated)
  # As an argument rather than a default: absl reads a default at once, and
  # would meet a wrong --config.key before `run` can answer for it.
  if not any(arg.split('=')[0] in _NAMES for arg in sys.argv):
    sys.argv.insert(1, f'--config={default}')
  holder = config_flags.DEFINE_config_file(
    'config',
    None,
    'A config file: it has get_config(), and values for it after a colon. Keys '
    'are changed by --config.key=value; moepeft/config/defaults.py lists all.',
    lock_config=True,
  )
  _show_in_help(('config',))
  return holder


def rewritten(argv: Sequence[str]) -> list[str]:
  """Arguments with flags of ours in place of --gin.x and open sections."""
  argv = gin_flags.rewritten(argv)
  for name, section in _OPEN_SECTIONS.items():
    pattern = rf'^--?config\.{re.escape(section)}\.'
    argv = [re.sub(pattern, f'--{name}=', arg) for arg in argv]
  return argv


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
    host_memory.keep()
    answer(lambda: main(argv), _TRACEBACK.value)

  app.run(safe_main, flags_parser=parse)


def answer(main: Callable[[], None], with_traceback: bool = False) -> None:
  """Runs a command's work; what a user can mend ends it with a sentence.

  Exit codes are 2, 130 after Ctrl-C, and 141 where the reader of the output,
  like `head`, has left.
  """
  for stream in (sys.stdout, sys.stderr):
    # A terminal of ASCII gets escapes in place of an error.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  try:
    main()
    sys.stdout.flush()
  except KeyboardInterrupt:
    print('\nstopped', file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:
    # Python would try to write the rest at exit, and say so.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(141)
  except Exception as e:
    sentence = sentence_of(e)
    if sentence is None or with_traceback:
      raise
    _stop(sentence)


def sentence_of(error: Exception) -> str | None:
  """The sentence for an error of a user; None for a fault of the program."""
  first = (str(error).splitlines() or [''])[0]
  if is_out_of_memory(error):
    detail = f' ({first})' if first else ''
    return (
      f'memory ran out{detail}; lower config.batch_size, the lengths of '
      'config.data or --batch_size, raise config.gradient_accumulation_steps, '
      'or set '
      'config.model.remat=full or config.model.quantize=int8'
    )
  if isinstance(error, _ERRORS):
    return str(error)
  if _is_of_start(error):
    platforms = os.environ.get('JAX_PLATFORMS', '')
    return (
      f'JAX cannot start with JAX_PLATFORMS={platforms!r}'
      f'{f" ({first})" if first else ""}; install the JAX of that device, or '
      'unset JAX_PLATFORMS'
    )
  return None


def _is_of_start(error: Exception) -> bool:
  """Whether JAX raised it as it looked for devices: it has no type for that."""
  trace = error.__traceback__
  files = [frame.filename for frame in traceback.extract_tb(trace)]
  return any(name.endswith('jax/_src/xla_bridge.py') for name in files)


def keep_programs() -> None:
  """Compiled programs outlive the process (JAX_COMPILATION_CACHE_DIR)."""
  if jax.config.jax_compilation_cache_dir is None:
    path = os.path.join(os.path.expanduser('~'), '.cache', 'moepeft', 'jax')
    jax.config.update('jax_compilation_cache_dir', path)


def parse(argv: Sequence[str]) -> list[str]:
  """absl's flags of a command line; a wrong one is a sentence and exit 2.

  --help ends with 0.
  """
  _show_in_help((_TRACEBACK.name, _IMPORTS.name))
  argv = ['--help' if arg == '-h' else _located(arg) for arg in argv]
  for arg in argv:
    _check_exists(arg)

  def read() -> list[str]:
    rest = flags.FLAGS(argv)
    _import_modules()
    for name, section in _OPEN_SECTIONS.items():
      for text in flags.FLAGS[name].value if name in flags.FLAGS else ():
        _set_key(flags.FLAGS['config'].value, section, text)
    _check_values()
    return rest

  try:
    return _answered(read, argv)
  except SystemExit as e:
    # absl ends with 1 after printing the help.
    if e.code == 1 and any(arg.lstrip('-') in _HELP for arg in argv):
      sys.exit(0)
    raise


def _import_modules() -> None:
  """Imports the modules of --imports and of the config, and records them.

  Raises:
    ValueError: as `imports.import_modules`.
  """
  imports.import_modules(_IMPORTS.value, search_current=True)
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  if isinstance(config, ConfigDict):
    imports.import_modules(config.imports, search_current=True)
    modules = imports.names(f'{config.imports},{_IMPORTS.value}')
    config.imports = ','.join(dict.fromkeys(modules))


def _check_values() -> None:
  """
  Raises:
    ValueError: a flag is not a number, which bounds do not exclude, or a key of
      the config is out of its range.
  """
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    if isinstance(value, float) and math.isnan(value):
      raise ValueError(f'--{name} is a number; got nan')
  if 'config' not in flags.FLAGS:
    return
  config = flags.FLAGS['config'].value
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'get_config() of {flags.FLAGS["config"].config_filename} returned '
      f'{type(config).__name__}; expected that of moepeft.config.defaults'
    )
  config_check.check_ranges(config)


def _set_key(config: ConfigDict, section: str, text: str) -> None:
  """Sets a key of an open section by 'KEY=VALUE'; 'rope.kind=yarn' is a key."""
  key, equals, value = text.partition('=')
  if not key or not equals:
    raise ValueError(
      f'expected --config.{section}.KEY=VALUE; got {key!r} without a value'
    )
  try:
    typed = parse_literal(value)
  except ValueError:
    typed = value
  *parents, name = key.split('.')
  with config.unlocked(), config.ignore_type():
    node = config
    for parent in (*section.split('.'), *parents):
      if not isinstance(node.get(parent), ConfigDict):
        node[parent] = ConfigDict()
      node = node[parent]
    node[name] = typed


def _answered(read: Callable[[], Any], argv: Sequence[str]) -> Any:
  """The result of `read`; a sentence and exit code 2 where the user is wrong.

  A config is a user's Python, so any exception may come out of reading one.
  """
  try:
    return read()
  except flags.UnrecognizedFlagError as e:
    has_config = 'config' in flags.FLAGS
    _stop(suggestions.unknown_flag(e.flagname, list(flags.FLAGS), has_config))
  except (flags.Error, ValueError, OSError) as e:
    _stop(_of_keys(argv) or _reason(str(e)))
  except SyntaxError as e:
    _stop(f'the config {e.filename!r} is not Python (line {e.lineno}: {e.msg})')
  except Exception as e:
    if '--traceback' in argv:
      raise
    reason = f'{type(e).__name__}: {_reason(str(e))}'
    _stop(_of_keys(argv) or f'the config cannot be read: {reason}')


def _of_keys(argv: Sequence[str]) -> str:
  """The sentence for the first --config.key=value that cannot be, or ''."""
  keys = [arg for arg in argv if re.match(r'--?config\.', arg)]
  hints = (
    hint(arg)
    for hint in (suggestions.unknown_key, suggestions.wrong_type)
    for arg in keys
  )
  return next(filter(None, hints), '')


def _reason(message: str) -> str:
  """The line that says it: the last, where a config's traceback is quoted."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  if not lines:
    return 'no reason given'
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
    folders = (PACKAGE, os.path.dirname(PACKAGE))
    _stop(suggestions.unknown_config(file, folders))


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


def _stop(message: str) -> NoReturn:
  # A value of thousands of characters, or of lines, would bury the sentence.
  message = ' '.join(secrets.hidden(message).splitlines())
  message = re.sub(r'(\S{100})\S{400,}', r'\1...', message)
  terminal.show(f'error: {message}', file=sys.stderr)
  sys.exit(2)
