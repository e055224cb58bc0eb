# SPDX-License-Identifier: Apache-2.0
"""Parses the flags and the config of a command, and reports user errors."""

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
  'Modules to import first, such as my_module,other. They register methods, '
  'routers, objectives and so on (docs/extending). A run stores their names, '
  'and commands that read the run import them too.',
)
# Errors of users. Other errors are bugs and are shown with a traceback.
_USER_ERRORS = (ValueError, OSError)
_HELP_FLAGS = ('help', 'helpshort', 'helpfull', 'helpxml', '?', 'h')
_CONFIG_FLAGS = ('--config', '-config')
# {flag: section of the config}. The keys of these sections are defined by
# models and registry entries, so a locked config would refuse them.
_OPEN_SECTIONS = {'model_shape': 'model.shape', 'router_loss': 'router_losses'}
PACKAGE = str(pathlib.Path(__file__).resolve().parents[1])


def define_config(default: str) -> flags.FlagHolder[ConfigDict]:
  """Defines the flags of a config.

  They are --config=FILE[:values] and --config.key=value, or --gin_file.

  Args:
    default: the config file of a command line without --config.
  """
  gin_flags.define(flags.FLAGS)
  _show_in_help(gin_flags.NAMES)
  for name, section in _OPEN_SECTIONS.items():
    flags.DEFINE_multi_string(
      name, [], f'KEY=VALUE, the same as --config.{section}.KEY=VALUE.'
    )
  sys.argv[1:] = rewrite_flags(sys.argv[1:])
  gin_config = _exit_on_user_error(_translate_gin, sys.argv)
  if gin_config is not None:
    return _define_gin_config(gin_config)
  # An argument, not a default: absl parses a default immediately, so an error
  # in --config.key=value would be raised before `run` can report it.
  if not any(arg.split('=')[0] in _CONFIG_FLAGS for arg in sys.argv):
    sys.argv.insert(1, f'--config={default}')
  holder = config_flags.DEFINE_config_file(
    'config',
    None,
    'A config file: Python with a function get_config(). Values for it may '
    'follow after a colon. --config.key=value changes a key; '
    'moepeft/config/defaults.py lists all keys.',
    lock_config=True,
  )
  _show_in_help(('config',))
  return holder


def rewrite_flags(argv: Sequence[str]) -> list[str]:
  """Replaces --gin.x=... and keys of `_OPEN_SECTIONS` by defined flags."""
  argv = gin_flags.rewrite_flags(argv)
  for name, section in _OPEN_SECTIONS.items():
    pattern = rf'^--?config\.{re.escape(section)}\.'
    argv = [re.sub(pattern, f'--{name}=', arg) for arg in argv]
  return argv


def _show_in_help(names: Sequence[str]) -> None:
  # --help shows only the flags that the main module defines.
  for name in names:
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def gin_text() -> str:
  """The command line's gin files and overrides as one gin file, or ''."""
  gin_config = _translate_gin()
  return gin_config.text if gin_config else ''


def _translate_gin() -> gin_files.GinConfig | None:
  folders = (PACKAGE, os.path.dirname(PACKAGE))
  return gin_flags.translate(sys.argv, folders)


def _define_gin_config(
  gin_config: gin_files.GinConfig,
) -> flags.FlagHolder[ConfigDict]:
  for note in gin_config.notes:
    print(f'gin: {note}', file=sys.stderr)
  if 'workdir' in flags.FLAGS:
    sys.argv.insert(1, f'--workdir={gin_config.model_dir}')
  # absl parses --config.key=value immediately here.
  return _exit_on_user_error(
    lambda: config_flags.DEFINE_config_dict(
      'config',
      gin_config.config,
      'The config of the gin files; --config.key=value changes a key.',
      lock_config=True,
    ),
    sys.argv,
  )


def config_file() -> str:
  """The path of --config without its values; '' for --gin_file."""
  path = getattr(flags.FLAGS['config'], 'config_filename', '')
  return path.partition(':')[0]


def find_config(path: str) -> str:
  """Finds a config file.

  Args:
    path: FILE or FILE:values.

  Returns:
    The path, in the package's configs if there is no such file here.
  """
  file, colon, values = path.partition(':')
  # configs/ is in an installed package, and beside the package in a checkout.
  for folder in ('', PACKAGE, os.path.dirname(PACKAGE)):
    if os.path.isfile(os.path.join(folder, file)):
      return os.path.join(folder, file) + colon + values
  return path


def run(
  main: Callable[[Sequence[str]], None], takes_arguments: bool = False
) -> None:
  """Runs a command with `absl.app.run`, and reports errors of the user.

  Args:
    main: called with the program's name and the positional arguments.
    takes_arguments: whether positional arguments are allowed.
  """

  def safe_main(argv: Sequence[str]) -> None:
    # At level INFO, libraries log every step.
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1 and not takes_arguments:
      _exit_with_error(
        f'unexpected argument {argv[1]!r}; options are --name=value'
      )
    enable_compilation_cache()
    host_memory.tune_malloc()
    report_errors(lambda: main(argv), _TRACEBACK.value)

  app.run(safe_main, flags_parser=parse)


def report_errors(
  main: Callable[[], None], with_traceback: bool = False
) -> None:
  """Runs `main` and reports errors of users in one line.

  The exit code is 2 after such an error, 130 after Ctrl-C, and 141 if the
  process that reads the output has ended, as `head` does. Other exceptions
  propagate.
  """
  for stream in (sys.stdout, sys.stderr):
    # An ASCII terminal gets escapes; without this, writing raises an error.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  try:
    main()
    sys.stdout.flush()
  except KeyboardInterrupt:
    print('\nstopped', file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:
    # Python flushes stdout at exit, which would fail with a message.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(141)
  except Exception as e:
    message = error_message(e)
    if message is None or with_traceback:
      raise
    _exit_with_error(message)


def error_message(error: Exception) -> str | None:
  """The message for an error that the user can correct; None for a bug."""
  first_line = (str(error).splitlines() or [''])[0]
  detail = f' ({first_line})' if first_line else ''
  if is_out_of_memory(error):
    return (
      f'memory ran out{detail}; lower config.batch_size, the lengths of '
      'config.data or --batch_size, raise config.gradient_accumulation_steps, '
      'or set config.model.remat=full or config.model.quantize=int8'
    )
  if isinstance(error, _USER_ERRORS):
    return str(error)
  if _is_jax_init_error(error):
    platforms = os.environ.get('JAX_PLATFORMS', '')
    return (
      f'JAX cannot start with JAX_PLATFORMS={platforms!r}{detail}; install JAX '
      'for that device, or unset JAX_PLATFORMS'
    )
  return None


def _is_jax_init_error(error: Exception) -> bool:
  """Whether JAX raised the error while it initialized its backends.

  JAX has no exception type for that, so the traceback decides.
  """
  trace = error.__traceback__
  files = [frame.filename for frame in traceback.extract_tb(trace)]
  return any(name.endswith('jax/_src/xla_bridge.py') for name in files)


def enable_compilation_cache() -> None:
  """Stores compiled programs on disk, in JAX_COMPILATION_CACHE_DIR if set."""
  if jax.config.jax_compilation_cache_dir is None:
    path = os.path.join(os.path.expanduser('~'), '.cache', 'moepeft', 'jax')
    jax.config.update('jax_compilation_cache_dir', path)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags of a command line and returns the other arguments.

  The process exits with code 2 and a message after an error, and with code 0
  after --help.
  """
  _show_in_help((_TRACEBACK.name, _IMPORTS.name))
  argv = ['--help' if arg == '-h' else arg for arg in argv]
  argv = _exit_on_user_error(lambda: [*map(find_config_arg, argv)], ())

  def parse_flags() -> list[str]:
    positional = flags.FLAGS(argv)
    _import_modules()
    for name, section in _OPEN_SECTIONS.items():
      for text in flags.FLAGS[name].value if name in flags.FLAGS else ():
        _set_key(flags.FLAGS['config'].value, section, text)
    _check_values()
    return positional

  try:
    return _exit_on_user_error(parse_flags, argv)
  except SystemExit as e:
    # absl exits with 1 after printing the help.
    if e.code == 1 and any(arg.lstrip('-') in _HELP_FLAGS for arg in argv):
      sys.exit(0)
    raise


def _import_modules() -> None:
  """Imports the modules of --imports and of the config.

  Their names are added to `config.imports`.

  Raises:
    ValueError: see `imports.import_modules`.
  """
  imports.import_modules(_IMPORTS.value, search_current=True)
  config = flags.FLAGS['config'].value if 'config' in flags.FLAGS else None
  if isinstance(config, ConfigDict):
    imports.import_modules(config.imports, search_current=True)
    modules = imports.module_names(f'{config.imports},{_IMPORTS.value}')
    config.imports = ','.join(dict.fromkeys(modules))


def _check_values() -> None:
  """Checks the values of flags and of the config.

  Raises:
    ValueError: a flag is NaN (absl's bounds admit it), or a key of the config
      is out of its range.
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
      f'{type(config).__name__}; expected a ConfigDict like that of '
      'moepeft.config.defaults'
    )
  config_check.check_ranges(config)


def _set_key(config: ConfigDict, section: str, text: str) -> None:
  """Sets a key of an open section.

  Args:
    text: 'KEY=VALUE'; a key of a subsection is written 'rope.kind=yarn'.
  """
  key, equals, value = text.partition('=')
  if not key or not equals:
    raise ValueError(
      f'expected --config.{section}.KEY=VALUE; got {key!r} without a value'
    )
  try:
    parsed_value = parse_literal(value)
  except ValueError:
    parsed_value = value
  *parents, name = key.split('.')
  with config.unlocked(), config.ignore_type():
    node = config
    for parent in (*section.split('.'), *parents):
      if not isinstance(node.get(parent), ConfigDict):
        node[parent] = ConfigDict()
      node = node[parent]
    node[name] = parsed_value


def _exit_on_user_error(parse: Callable[[], Any], argv: Sequence[str]) -> Any:
  """Returns the result of `parse`, or exits with code 2 after an exception.

  Every exception counts as a user's error, because `parse` runs the Python code
  of a user's config.
  """
  try:
    return parse()
  except flags.UnrecognizedFlagError as e:
    has_config = 'config' in flags.FLAGS
    _exit_with_error(
      suggestions.unknown_flag(e.flagname, list(flags.FLAGS), has_config)
    )
  except (flags.Error, ValueError, OSError) as e:
    _exit_with_error(_config_key_error(argv) or _reason(str(e)))
  except SyntaxError as e:
    _exit_with_error(
      f'the config {e.filename!r} is not Python (line {e.lineno}: {e.msg})'
    )
  except Exception as e:
    if '--traceback' in argv:
      raise
    reason = f'{type(e).__name__}: {_reason(str(e))}'
    _exit_with_error(
      _config_key_error(argv) or f'the config cannot be read: {reason}'
    )


def _config_key_error(argv: Sequence[str]) -> str:
  """The message for the first invalid --config.key=value, or ''."""
  keys = [arg for arg in argv if re.match(r'--?config\.', arg)]
  hints = (
    hint(arg)
    for hint in (suggestions.unknown_key, suggestions.wrong_type)
    for arg in keys
  )
  return next(filter(None, hints), '')


def _reason(message: str) -> str:
  """The first line of a message, or the last of a traceback of a config."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  if not lines:
    return 'no reason given'
  if 'Error whilst parsing config file' in lines[0]:
    return lines[-1].removeprefix('ValueError: ')
  return lines[0]


def find_config_arg(arg: str) -> str:
  """An argument of a command line, with the path that `find_config` finds.

  Raises:
    ValueError: --config names no file.
  """
  name, equals, value = arg.partition('=')
  if name not in _CONFIG_FLAGS or not equals:
    return arg
  path = find_config(value)
  file = path.partition(':')[0]
  if not os.path.isfile(file):
    folders = (PACKAGE, os.path.dirname(PACKAGE))
    raise ValueError(suggestions.unknown_config(file, folders))
  return f'{name}={path}'


def check_can_write(path: str) -> None:
  """Checks that a file can be written, before minutes of work for it.

  Raises:
    ValueError: the directory is missing, or the file cannot be written.
  """
  folder = os.path.dirname(os.path.abspath(path))
  if not os.path.isdir(folder):
    raise ValueError(f'{path!r} cannot be written: make the folder {folder!r}')
  if os.path.isdir(path):
    raise ValueError(f'{path!r} cannot be written: it is a folder; name a file')
  if not os.access(path if os.path.exists(path) else folder, os.W_OK):
    raise ValueError(f'{path!r} cannot be written: permission is denied')


def print_error(message: str) -> None:
  """Prints the line of an error of the user."""
  # A long value in the message is shortened, and its line breaks are removed.
  message = ' '.join(secrets.redact(message).splitlines())
  message = re.sub(r'(\S{100})\S{400,}', r'\1...', message)
  terminal.show(f'error: {message}', file=sys.stderr)


def _exit_with_error(message: str) -> NoReturn:
  print_error(message)
  sys.exit(2)
