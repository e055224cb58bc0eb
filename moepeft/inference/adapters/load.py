# SPDX-License-Identifier: Apache-2.0
"""Adapters from wherever they lie, checked whole before they are served."""

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

# {path in a 'peft' tree: its shape, and what it says of itself}.
Layout = Mapping[str, tuple[tuple[int, ...], ParamMetadata]]


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
  """An adapter on the host, as it was trained.

  Attributes:
    built: its method, ready for the base.
    bucket: the smallest that holds it.
    arrays: {path in the 'peft' tree: float32 array}.
    sha256: of its content: method, semantics and every array.
    source: the path that it was read from.
    soft_prompt_ids: placeholders of its soft prompt.
  """

  built: Built
  bucket: Bucket
  arrays: dict[str, np.ndarray]
  sha256: str
  source: str
  soft_prompt_ids: tuple[int, ...] = ()


def read_adapter(path: str, base: Base) -> TrainedAdapter:
  """Reads a run's work directory, an adapter of ours, or one of peft's.

  Raises:
    ValueError: nothing is there, it is damaged, another base's, or not for
      serving.
    OSError: something in it is a pipe, a socket or a device.
  """
  check_regular(os.path.expanduser(path))
  stored = _stored(path, base)
  _check_base(stored, path, base)
  semantics = stored.semantics or 'official'
  built = build(stored.method, base.family.sites(base.config), semantics)
  bucket = bucket_of(built, path)
  arrays = {
    name: np.asarray(leaf, np.float32)
    for name, leaf in weight_mapping.flatten(stored.tree).items()
  }
  _check_arrays(arrays, built, path, base)
  content = '\n'.join(
    (
      canonical_text(stored.method, semantics),
      semantics,
      weight_mapping.content_hash(arrays),
    )
  )
  sha256 = hashlib.sha256(content.encode()).hexdigest()
  soft_prompt_ids = placeholder_ids(built.adapter_map, base.config.vocab)
  return TrainedAdapter(built, bucket, arrays, sha256, path, soft_prompt_ids)


def check_regular(path: str) -> None:
  """Checks all that lies below a path before libraries open it, which would
  wait for ever for a pipe.

  Raises:
    OSError: something is a pipe, a socket or a device.
  """
  files.check_file(path)
  # Links to directories are followed one level deep, by `check_files`.
  for folder, folders, _ in os.walk(path):
    files.check_files(folder)
    for name in folders:
      files.check_files(os.path.join(folder, name))


@dataclasses.dataclass(frozen=True)
class _Stored:
  """An adapter's file; `sha256` is the base's, None where it names none."""

  method: str
  tree: Tree
  semantics: str
  sha256: str | None
  quantise: str | None


@functools.lru_cache(maxsize=64)
def arrays_of(model: nn.Module) -> Layout:
  """The arrays in 'peft' of a model; traced once for a method."""
  return param_metadata(model, base_lib.example_batch())


def _stored(path: str, base: Base) -> _Stored:
  adapter = base_lib.load_adapter(path, base.config)
  # Only our own form says it, and what was kept in how many bits with it.
  is_ours = adapter.quantise is not None
  return _Stored(
    adapter.method,
    adapter.tree,
    adapter.semantics,
    adapter.sha256 if is_ours else None,
    adapter.quantise,
  )


def _check_base(stored: _Stored, path: str, base: Base) -> None:
  if stored.sha256 not in (None, base.sha256):
    raise ValueError(
      f'{path} was trained on another base than {base.path!r} (their content '
      'hashes differ); start a server with --model set to its own'
    )
  if stored.quantise not in (None, base.quantise):
    raise ValueError(
      f'{path} was trained on a base kept in {stored.quantise or "full"!r}, '
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
  broken = sorted(n for n, a in arrays.items() if not np.isfinite(a).all())
  if broken:
    raise ValueError(
      f'{path} holds numbers that are infinite or none (in {broken[0]}): its '
      'training diverged; serve an earlier checkpoint of it'
    )
