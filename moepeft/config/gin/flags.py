# SPDX-License-Identifier: Apache-2.0
"""T5X's flags for a config: --gin_file=FILE, --gin.NAME=VALUE.

The config must be known before absl parses the other flags, so this module
reads these flags first.
"""

import os
from collections.abc import Sequence

from absl import flags

from moepeft.config import gin as gin_files

_CACHES = 'seqio_additional_cache_dirs'
NAMES = ('gin_file', 'gin_bindings', 'gin_search_paths', _CACHES)


def define(values: flags.FlagValues) -> None:
  """Defines the flags, with T5X's names."""
  options = {'flag_values': values}
  flags.DEFINE_multi_string(
    'gin_file',
    [],
    "Instead of --config: a file with T5X's macro names, like gin/molora.gin. "
    'With several files, a later value replaces an earlier one. '
    '--gin.NAME=VALUE changes a macro or a binding, and --config.key=value any '
    'key of the config.',
    **options,
  )
  flags.DEFINE_multi_string(
    'gin_bindings', [], 'NAME=VALUE, the same as --gin.NAME=VALUE.', **options
  )
  flags.DEFINE_list(
    'gin_search_paths', [], 'More directories of gin files.', **options
  )
  flags.DEFINE_string(
    _CACHES, '', 'With --gin_file: a directory of cached tasks.', **options
  )


def rewrite_flags(argv: Sequence[str]) -> list[str]:
  """Replaces --gin.NAME=VALUE by --gin_bindings=NAME=VALUE."""
  result = []
  for arg in argv:
    name = arg.lstrip('-')
    is_gin = arg.startswith('-') and name.startswith('gin.')
    binding = name.removeprefix('gin.')
    result.append(f'--gin_bindings={binding}' if is_gin else arg)
  return result


def translate(
  argv: Sequence[str], search_paths: Sequence[str]
) -> gin_files.GinConfig | None:
  """The config of a command line's gin flags; None if it has no such flag.

  Args:
    argv: the result of `rewrite_flags`; other flags are ignored.
    search_paths: directories of gin files, searched after --gin_search_paths.

  Returns:
    As `gin_files.load`. model_dir is --workdir if that is set, and
    workdirs/<names of the files> if MODEL_DIR is not set either.

  Raises:
    ValueError: two flags exclude each other, or as `gin_files.load`.
  """
  values = flags.FlagValues()
  define(values)
  for name in ('workdir', 'config', 'config.data.path'):
    flags.DEFINE_string(name, '', '', flag_values=values)
  values.set_gnu_getopt(True)
  values(argv, known_only=True)
  files, bindings = values.gin_file, values.gin_bindings
  if not files and not bindings:
    if values.gin_search_paths or values[_CACHES].value:
      raise ValueError(
        f'--gin_search_paths and --{_CACHES} need --gin_file=FILE'
      )
    return None
  if values.config:
    raise ValueError(
      f'--config={values.config} and --gin_file are both set: keep one'
    )
  cache_dir = values[_CACHES].value or values['config.data.path'].value
  paths = (*values.gin_search_paths, *search_paths)
  gin_config = gin_files.load(files, bindings, paths, cache_dir)
  return gin_config._replace(
    model_dir=_workdir(values.workdir, gin_config.model_dir, files)
  )


def _workdir(workdir: str, model_dir: str, files: Sequence[str]) -> str:
  if workdir and model_dir and workdir != model_dir:
    raise ValueError(
      f'--workdir={workdir} and MODEL_DIR={model_dir!r} are both set: keep one'
    )
  names = [os.path.basename(file).removesuffix('.gin') for file in files]
  default = os.path.join('workdirs', '_'.join(names) or 'gin')
  return workdir or model_dir or default
