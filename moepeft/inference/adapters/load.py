# SPDX-License-Identifier: Apache-2.0
"""Reads adapters from runs, exports and peft directories, and checks them."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping

import flax.linen as nn
import numpy as np

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.base import Base
from moepeft.core import files
from moepeft.core.types import Tree
from moepeft.inference.adapters.buckets import Bucket, bucket_of
from moepeft.models import weight_mapping
from moepeft.nn.initializers import ParamMetadata, param_metadata
from moepeft.peft import Built, build
from moepeft.peft.method_text import canonical_text
from moepeft.peft.prefix import placeholder_ids

# {path in a 'peft' tree: (shape, metadata)}.
Layout = Mapping[str, tuple[tuple[int, ...], ParamMetadata]]


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
  """An adapter on the host, as it was trained.

  Attributes:
    built: the method, built for the base.
    bucket: the smallest bucket that holds the adapter.
    arrays: {path in the 'peft' tree: float32 array}.
    sha256: hash of the method, the semantics and every array.
    source: the path from which it was read.
    soft_prompt_ids: the placeholder ids of its soft prompt.
  """

  built: Built
  bucket: Bucket
  arrays: dict[str, np.ndarray]
  sha256: str
  source: str
  soft_prompt_ids: tuple[int, ...] = ()


def read_adapter(path: str, base: Base) -> TrainedAdapter:
  """Reads an adapter: a run's work directory, an export, or a peft directory.

  Raises:
    ValueError: there is no adapter, it is damaged, belongs to another base, or
      cannot be served.
    OSError: a file is a pipe, a socket or a device.
  """
  check_regular(os.path.expanduser(path))
  file = _read_file(path, base)
  _check_base(file, path, base)
  semantics = file.semantics or 'official'
  built = build(file.method, base.family.sites(base.config), semantics)
  bucket = bucket_of(built, path)
  arrays = {
    name: np.asarray(leaf, np.float32)
    for name, leaf in weight_mapping.flatten(file.tree).items()
  }
  _check_arrays(arrays, built, path, base)
  content = '\n'.join(
    (
      canonical_text(file.method, semantics),
      semantics,
      weight_mapping.content_hash(arrays),
    )
  )
  sha256 = hashlib.sha256(content.encode()).hexdigest()
  soft_prompt_ids = placeholder_ids(built.adapter_map, base.config.vocab)
  return TrainedAdapter(built, bucket, arrays, sha256, path, soft_prompt_ids)


def check_regular(path: str) -> None:
  """Checks that all files below a path are regular: opening a pipe may block.

  Raises:
    OSError: a file is a pipe, a socket or a device.
  """
  files.check_file(path)
  # Links to directories are followed one level deep, by `check_files`.
  for folder, folders, _ in os.walk(path):
    files.check_files(folder)
    for name in folders:
      files.check_files(os.path.join(folder, name))


@dataclasses.dataclass(frozen=True)
class _AdapterFile:
  """The contents of an adapter's file.

  Attributes:
    sha256: hash of the base that the adapter was trained on; None if unknown.
    quantise: the quantization of that base; None if unknown.
  """

  method: str
  tree: Tree
  semantics: str
  sha256: str | None
  quantise: str | None


@functools.lru_cache(maxsize=64)
def arrays_of(model: nn.Module) -> Layout:
  """The layout of a model's 'peft' collection; cached, because it is traced."""
  return param_metadata(model, base_lib.example_batch())


def _read_file(path: str, base: Base) -> _AdapterFile:
  adapter = base_lib.load_adapter(path, base.config)
  # Only this package's own exports record the base's hash and quantization.
  has_base_hash = adapter.quantise is not None
  return _AdapterFile(
    adapter.method,
    adapter.tree,
    adapter.semantics,
    adapter.sha256 if has_base_hash else None,
    adapter.quantise,
  )


def _check_base(file: _AdapterFile, path: str, base: Base) -> None:
  if file.sha256 not in (None, base.sha256):
    raise ValueError(
      f'{path} was trained on another base than {base.path!r} (their content '
      'hashes differ); start a server with --model set to its own'
    )
  if file.quantise not in (None, base.quantise):
    raise ValueError(
      f'{path} was trained on a base kept in {file.quantise or "full"!r}, '
      f'this one is kept in {base.quantise or "full"!r}; start a server with '
      'its own'
    )


def _check_arrays(
  arrays: Mapping[str, np.ndarray], built: Built, path: str, base: Base
) -> None:
  expected = arrays_of(base.family.module(base.config, built.adapter_map))
  weight_mapping.check(
    {name: shape for name, (shape, _) in expected.items()},
    {name: a.shape for name, a in arrays.items()},
    f'{path} does not fit {built.method!r}',
    'export the adapter again from its run',
  )
  not_finite = sorted(n for n, a in arrays.items() if not np.isfinite(a).all())
  if not_finite:
    raise ValueError(
      f'{path} contains NaN or infinite values (in {not_finite[0]}): its '
      'training diverged; serve an earlier checkpoint of it'
    )
