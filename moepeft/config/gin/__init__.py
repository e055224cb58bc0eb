# SPDX-License-Identifier: Apache-2.0
"""Converts gin files with T5X's macro names to ConfigDicts.

- syntax: reads files and overrides, with gin-config's parser.
- names: the supported macros and bindings; all others are errors.
- translate: converts their values to a config of `moepeft.config.defaults`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from moepeft.config.gin import names
from moepeft.config.gin.names import macro_names
from moepeft.config.gin.syntax import read
from moepeft.config.gin.translate import translate

LARGE = 'gin/models/t5_1_1_large.gin'

__all__ = ['LARGE', 'GinConfig', 'load', 'macro_names']


class GinConfig(NamedTuple):
  """The result of `load`.

  Attributes:
    config: a config with every key of `moepeft.config.defaults.default`.
    model_dir: MODEL_DIR, '' if no file sets it.
    text: the files and overrides as one gin file, which a run stores.
    notes: a sentence for each assumption and each ignored binding.
  """

  config: ConfigDict
  model_dir: str
  text: str
  notes: tuple[str, ...]


def load(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  folders: Sequence[str] = (),
  cached: str = '',
) -> GinConfig:
  """Reads gin files in order, then overrides.

  Args:
    files, bindings, folders: as in `syntax.read`.
    cached: the directory of cached SeqIO tasks, '' for none.

  Raises:
    ValueError: a file is absent or not gin, or a name or a value is not
      supported.
  """
  statements, notes = read(files, bindings, folders), []
  if not names.SHAPE.keys() <= {
    names.macro_name(key) for key in statements.values
  }:
    statements = read([LARGE, *files], bindings, folders)
    notes.append(
      f'no file sets the whole size of the model, so {LARGE} is read first (a '
      'checkpoint has its own size)'
    )
  values, modules, unused = names.sort_statements(statements)
  if unused:
    notes.append(f'ignored, as moepeft does not use it: {", ".join(unused)}')
  if 'RANDOM_SEED' in values and values['RANDOM_SEED'] is None:
    notes.append('RANDOM_SEED = None is seed 0 here, so runs are reproducible')
  config = translate(values, modules, cached)
  model_dir = values.get('MODEL_DIR', '')
  return GinConfig(config, model_dir, statements.text(), tuple(notes))
