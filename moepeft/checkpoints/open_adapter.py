# SPDX-License-Identifier: Apache-2.0
"""Opens trained adapters in any supported format."""

from pathlib import Path
from typing import Any, NamedTuple

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints import pip_models
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.restore import restore_adapter
from moepeft.checkpoints.t5x import model as t5x
from moepeft.core.files import local_path
from moepeft.core.types import Tree
from moepeft.runs.run import Run


def resolve(path: str) -> str:
  """Resolves the short name of a model to its path.

  'package:t5_tiny' is a directory of moepeft, 'smollm2' a file of a pip
  package; other paths are returned unchanged.

  Raises:
    ValueError: the asset does not exist, or the package is not installed.
  """
  return pip_models.resolve(local_path(path))


class StoredAdapter(NamedTuple):
  """A trained adapter in memory.

  Attributes:
    method: the method string.
    tree: the 'peft' tree.
    sha256: the hash of the base in training, '' if the format has none.
    semantics: the semantics in training, '' if the format has none.
    quantise: the quantization of the base in training, None if unknown.
  """

  method: str
  tree: Tree
  sha256: str = ''
  semantics: str = ''
  quantise: str | None = None


def load_adapter(path: str, config: Any) -> StoredAdapter:
  """Loads the adapter of a run's latest checkpoint or of another format.

  What only training needs is folded, as in an export.

  Args:
    path: a work directory of moepeft.train, or a path in a format of
      `formats.FORMATS`.
    config: the model's config.

  Raises:
    ValueError: the path holds no adapter.
  """
  path = resolve(path)
  is_run = Run(path).has_checkpoints_dir
  # A name on the hub is that of a model.
  is_missing = not Path(path).exists()
  form = '' if is_run or is_missing else checkpoint_formats.detect(path)
  if is_run or form == 'moepeft':
    tree, metadata = restore_adapter(path) if is_run else adapter_lib.load(path)
    base = metadata['base']
    return StoredAdapter(
      *adapter_lib.folded(AdapterWeights(metadata['method'], tree)),
      base['sha256'],
      metadata['semantics'],
      base.get('quantise', ''),
    )
  if form == 'peft':
    return StoredAdapter(*peft.load(path, config))
  if form == 't5x' and (adapter := t5x.load(path).adapter):
    return StoredAdapter(*adapter)
  problem = 'does not exist' if is_missing else 'holds no adapter'
  raise ValueError(
    f'{path} {problem}; expected the work directory of a run, an '
    'adapter of moepeft or of peft, or a T5X checkpoint of the released code'
  )


def check_base(adapter: StoredAdapter, path: str, base: Any) -> None:
  """
  Args:
    path: where the adapter was read.
    base: a `moepeft.checkpoints.base.Base`.

  Raises:
    ValueError: the adapter was trained on another base or quantization.
  """
  if adapter.sha256 and base.sha256 and adapter.sha256 != base.sha256:
    raise ValueError(
      f'{path} was trained on another base than {base.path} (their content '
      'hashes differ); set config.model.path to that base'
    )
  if adapter.quantise not in (None, base.quantise):
    raise ValueError(
      f'{path} was trained with config.model.quantize={adapter.quantise!r}, '
      f'this base has {base.quantise!r}; set it to {adapter.quantise!r}, or '
      'name another adapter'
    )
