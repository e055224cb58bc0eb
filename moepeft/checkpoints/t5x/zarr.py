# SPDX-License-Identifier: Apache-2.0
"""Reads and writes zarr arrays of T5X and Orbax checkpoints."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from moepeft.checkpoints import directory
from moepeft.core import untrusted
from moepeft.models.weight_mapping import CheckpointError

_COMPRESSOR = {'id': 'gzip', 'level': 1}
# No fsync for each of thousands of small files.
_CONTEXT = {'file_io_sync': False}

# The maximum number of chunks of an array. T5X's chunks have megabytes, so that
# the embedding of a million tokens has hundreds of chunks.
_MAX_CHUNKS = 1_000_000
# The maximum ratio of an array's size to its size on disk, and the tolerance in
# bytes. For zeros, gzip reaches a thousand, zstd some ten thousand.
_MAX_RATIO, _SLACK = 100_000, 2**20


def read_metadata(path: Path) -> dict[str, Any]:
  """Reads .zarray: {'shape': ..., 'chunks': ..., ...}.

  Raises:
    CheckpointError: the file is missing or damaged.
  """
  file = path / '.zarray'
  metadata = directory.read_json(file)
  try:
    shape, chunks = (
      untrusted.field(metadata, name, list) for name in ('shape', 'chunks')
    )
    sizes = [*shape, *chunks]
    are_sizes = all(type(size) is int and 0 <= size < 2**48 for size in sizes)
    if not are_sizes or len(shape) != len(chunks) or 0 in chunks:
      raise untrusted.Malformed(
        f'expected sizes and as many chunk sizes, got {shape} and {chunks}'
      )
    separator = untrusted.field(metadata, 'dimension_separator', str, '.')
    if separator not in ('.', '/'):
      raise untrusted.Malformed(
        f"expected '.' or '/' between, got {separator!r}"
      )
    count = math.prod(map(_chunk_count, shape, chunks))
    if count > _MAX_CHUNKS:
      raise untrusted.Malformed(f'{count:,} chunks, at most {_MAX_CHUNKS:,}')
  except untrusted.Malformed as error:
    raise CheckpointError(
      f'{file} is damaged ({error}): copy it again'
    ) from None
  return metadata


def _chunk_count(size: int, chunk: int) -> int:
  return math.ceil(size / chunk)


def read(path: Path, metadata: Mapping[str, Any]) -> np.ndarray:
  """Reads an array after checking that all its chunks exist.

  tensorstore replaces a missing chunk by the fill value, or by zeros if there
  is none, as in T5X's arrays, so that a lost file would not be detected.

  Args:
    metadata: the array's `read_metadata`.

  Raises:
    CheckpointError: a chunk is missing or damaged.
  """
  grid = [
    range(_chunk_count(size, chunk))
    for size, chunk in zip(metadata['shape'], metadata['chunks'], strict=True)
  ]
  separator = metadata.get('dimension_separator') or '.'
  stored_bytes = 0
  for index in itertools.product(*grid):
    chunk = path / (separator.join(map(str, index)) or '0')
    if chunk.is_file():
      stored_bytes += chunk.stat().st_size
    elif metadata.get('fill_value') is None:
      raise CheckpointError(f'{chunk} is missing: copy the checkpoint again')
  kvstore = {'driver': 'file', 'path': str(path.resolve())}
  with _raise_as_damaged(path):
    store = tensorstore.open({'driver': 'zarr', 'kvstore': kvstore}).result()
    # tensorstore always allocates whole chunks.
    chunk = math.prod(metadata['chunks']) * store.dtype.numpy_dtype.itemsize
    _check_size(path, max(_array_bytes(store), chunk), stored_bytes)
    return store.read().result()


def open_orbax_array(folder: Path, name: str) -> tensorstore.TensorStore:
  """Opens an array of an Orbax directory, in OCDBT or in a zarr 3 directory.

  Raises:
    CheckpointError: the array is missing or damaged.
  """
  base = {'driver': 'file', 'path': f'{folder.resolve()}/'}
  if (folder / 'manifest.ocdbt').is_file():
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  elif (folder / name).is_dir():
    kvstore = base | {'path': f'{(folder / name).resolve()}/'}
  else:
    raise CheckpointError(
      f'{folder} lacks {name}, which its index names: copy it again'
    )
  with _raise_as_damaged(folder / name):
    for driver in _DRIVERS:
      try:
        spec = {'driver': driver, 'kvstore': kvstore}
        return tensorstore.open(spec).result()
      except ValueError:
        if driver == _DRIVERS[-1]:
          raise


def read_orbax_array(
  folder: Path, name: str, store: tensorstore.TensorStore
) -> np.ndarray:
  """Reads the array that `open_orbax_array` opened.

  Raises:
    CheckpointError: a chunk is missing or damaged.
  """
  path = folder / name
  with _raise_as_damaged(path):
    chunks = store.chunk_layout.write_chunk.shape
    chunk_count = math.prod(map(_chunk_count, store.shape, chunks))
    keys = [key.decode() for key in store.kvstore.list().result()]
    chunk_keys = [
      key for key in keys if key.rpartition('/')[2] not in _METADATA_FILES
    ]
    if len(chunk_keys) < chunk_count and store.fill_value is None:
      raise CheckpointError(
        f'{path} lacks {chunk_count - len(chunk_keys)} of {chunk_count} '
        'chunks: copy the checkpoint again'
      )
    stored_bytes = sum(
      f.stat().st_size for f in folder.rglob('*') if f.is_file()
    )
    _check_size(path, _array_bytes(store), stored_bytes)
    return store.read().result()


# Metadata files of zarr 2 and 3, and tensorstore's drivers for these versions.
_METADATA_FILES = ('.zarray', '.zattrs', 'zarr.json')
_DRIVERS = ('zarr', 'zarr3')


def _array_bytes(store: tensorstore.TensorStore) -> int:
  return math.prod(store.shape) * store.dtype.numpy_dtype.itemsize


def _check_size(path: Path, size: int, stored_bytes: int) -> None:
  """Raises if an array is too large for its bytes on disk."""
  if size > _MAX_RATIO * stored_bytes + _SLACK:
    raise CheckpointError(
      f'{path} has {size:,} bytes by its metadata, but {stored_bytes:,} on the '
      'disk: it is damaged, copy it again'
    )


@contextlib.contextmanager
def _raise_as_damaged(path: Path) -> Iterator[None]:
  """Converts tensorstore's errors to a CheckpointError."""
  try:
    yield
  except CheckpointError:
    raise
  except (ValueError, OSError, NotImplementedError) as error:
    reason = str(error).splitlines()[0][:200]
    raise CheckpointError(
      f'{path} is truncated or damaged ({reason}): copy it again'
    ) from None


def write(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
  """Writes `folder`/`name`, in one chunk.

  Returns:
    The tensorstore spec of the array for T5X's index.
  """
  shape = list(array.shape)
  metadata = {'chunks': shape, 'compressor': _COMPRESSOR, 'shape': shape}
  spec = {'driver': 'zarr', 'dtype': str(array.dtype), 'metadata': metadata}
  kvstore = {'driver': 'file', 'path': str((folder / name).resolve())}
  store = tensorstore.open(
    spec | {'kvstore': kvstore},
    create=True,
    context=tensorstore.Context(_CONTEXT),
  ).result()
  store.write(array).result()
  return spec | {'kvstore': {'driver': 'file', 'path': f'{name}/'}}
