# SPDX-License-Identifier: Apache-2.0
"""How a command starts: flags, configs found, and errors in one sentence."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_TRACEBACK = flags.DEFINE_bool(
  'traceback', False, 'Show where an error was raised.'
)
# What users cause; anything else is a bug and keeps its traceback.
_ERRORS = (ValueError, OSError)
_NAMES = ('--config', '-config')
PACKAGE = os.path.dirname(os.path.abspath(__file__))


def define_config(default: str) -> flags.FlagHolder[ConfigDict]:
  """The flag --config=FILE[:values] and --config.key=value."""
  # As an argument rather than a default: absl reads a default at once, and
  # would meet a wrong --config.key before `run` can answer for it.
  if not any(arg.split('=')[0] in _NAMES for arg in sys.argv):
    sys.argv.insert(1, f'--config={default}')
  return config_flags.DEFINE_config_file(
    'config',
    None,
    'A card: a file with get_config(), and values for it after a colon. Keys '
    'are changed by --config.key=value; moepeft/config.py lists them all.',
    lock_config=True,
  )


def locate(path: str) -> str:
  """A config's path: as given, or the one that ships with the package."""
  file, colon, values = path.partition(':')
  # In an installed package configs/ lies inside it, in a checkout beside it.
  for folder in ('', PACKAGE, os.path.dirname(PACKAGE)):
    if os.path.isfile(os.path.join(folder, file)):
      return os.path.join(folder, file) + colon + values
  return path


def run(main: Callable[[Sequence[str]], None]) -> None:
  """`absl.app.run`, with bad input answered by one sentence and exit code 2."""

  def safe_main(argv: Sequence[str]) -> None:
    # Libraries tell their every step at the level of information.
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
      _stop(f'unexpected argument {argv[1]!r}; options are --name=value')
    try:
      main(argv)
    except _ERRORS as e:
      if _TRACEBACK.value:
        raise
      _stop(str(e))

  app.run(safe_main, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  argv = [_located(arg) for arg in argv]
  for arg in argv:
    _check_exists(arg)
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, OSError) as e:
    _stop(_reason(str(e)))
  except (AttributeError, KeyError, TypeError) as e:
    reason = str(e).strip('\'"').splitlines()[0]
    _stop(f'a --config option does not fit the config: {reason}')


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


def _stop(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)
