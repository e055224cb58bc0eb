# SPDX-License-Identifier: Apache-2.0
"""Converts gin files with T5X's macro names to ConfigDicts.

- syntax: reads files and overrides, with gin-config's parser.
- names: lists the supported macros and bindings, and rejects others.
- translate: writes the values into a copy of `moepeft.config.defaults`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from moepeft.config.gin import names
from moepeft.config.gin.names import macro_names
from moepeft.config.gin.syntax import read
from moepeft.config.gin.translate import translate

DEFAULT_MODEL_FILE = 'gin/models/t5_1_1_large.gin'

__all__ = ['DEFAULT_MODEL_FILE', 'GinConfig', 'load', 'macro_names']


class GinConfig(NamedTuple):
  """The result of `load`.

  Attributes:
    config: a config with every key of `moepeft.config.defaults.default`.
    model_dir: the macro MODEL_DIR, or '' if it is not set.
    text: all bindings as one gin file, which is saved with the run.
    notes: a sentence for each assumption and each ignored binding.
  """

  config: ConfigDict
  model_dir: str
  text: str
  notes: tuple[str, ...]


def load(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  cache_dir: str = '',
) -> GinConfig:
  """Reads gin files in order, then overrides.

  Args:
    files, bindings, search_paths: as in `syntax.read`.
    cache_dir: the directory of cached SeqIO tasks, or ''.

  Raises:
    ValueError: a file is absent or not gin, or a name or a value is not
      supported.
  """
  statements, notes = read(files, bindings, search_paths), []
  if not names.MODEL_SIZES.keys() <= {
    names.macro_name(key) for key in statements.values
  }:
    statements = read([DEFAULT_MODEL_FILE, *files], bindings, search_paths)
    notes.append(
      'the files do not set all sizes of the model, so missing ones are from '
      f'{DEFAULT_MODEL_FILE}; a checkpoint replaces them'
    )
  values, task_modules, unused = names.classify_statements(statements)
  if unused:
    notes.append(f'moepeft does not use and ignores: {", ".join(unused)}')
  if 'RANDOM_SEED' in values and values['RANDOM_SEED'] is None:
    notes.append('RANDOM_SEED = None is seed 0 here, so runs are reproducible')
  config = translate(values, task_modules, cache_dir)
  model_dir = values.get('MODEL_DIR', '')
  return GinConfig(config, model_dir, statements.to_gin(), tuple(notes))
