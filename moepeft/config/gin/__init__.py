# SPDX-License-Identifier: Apache-2.0
"""gin files with T5X's macro names, as ConfigDicts.

- syntax: reads stacked files and overrides, with gin-config's parser.
- names: which macros and bindings have a meaning; others are errors.
- translate: what they say, as a config of `moepeft.config.defaults`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from moepeft.config.gin.names import SHAPE, macro_names, meaning, sort
from moepeft.config.gin.syntax import read
from moepeft.config.gin.translate import translate

LARGE = 'gin/models/t5_1_1_large.gin'

__all__ = ['LARGE', 'GinConfig', 'load', 'macro_names']


class GinConfig(NamedTuple):
  """The config of a stack of gin files.

  Attributes:
    config: a config with every key of `moepeft.config.defaults.default`.
    model_dir: MODEL_DIR, '' if it is not given.
    text: the files and overrides as one gin file, to be stored with a run.
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
  """Reads stacked gin files and overrides.

  Args:
    files, bindings, folders: as in `syntax.read`.
    cached: the directory of cached SeqIO tasks, '' for none.

  Raises:
    ValueError: a file is absent or not gin, or a name or a value is none that
      this project knows.
  """
  statements, notes = read(files, bindings, folders), []
  if not SHAPE.keys() <= {meaning(key) for key in statements.values}:
    statements = read([LARGE, *files], bindings, folders)
    notes.append(
      f'no file gives the whole size of the model, so {LARGE} is read first (a '
      'checkpoint has its own size)'
    )
  values, modules, unused = sort(statements)
  if unused:
    notes.append(f'left out, as it has no meaning here: {", ".join(unused)}')
  if 'RANDOM_SEED' in values and values['RANDOM_SEED'] is None:
    notes.append('RANDOM_SEED = None is seed 0 here: runs repeat')
  config = translate(values, modules, cached)
  model_dir = values.get('MODEL_DIR', '')
  return GinConfig(config, model_dir, statements.text(), tuple(notes))
