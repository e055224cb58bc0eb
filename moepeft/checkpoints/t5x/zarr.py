# SPDX-License-Identifier: Apache-2.0
"""Single arrays in zarr directories (version 2), as T5X keeps them."""

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
# Not waiting for the disk at every one of thousands of small files.
_UNSYNCED = {'file_io_sync': False}


# Chunks of one array. T5X's are of megabytes, so an embedding of a million
# pieces has hundreds.
_MAX_CHUNKS = 1_000_000
# Bytes of an array by one on the disk: gzip packs zeros by a thousand, zstd by
# some ten thousand.
_MAX_RATIO, _SLACK = 100_000, 2**20


def read_metadata(path: Path) -> dict[str, Any]:
  """Reads .zarray: {'shape': ..., 'chunks': ..., ...}.

  Raises:
    CheckpointError: it is absent or damaged.
  """
  file = path / '.zarray'
  metadata = directory.read_json(file)
  try:
    shape, chunks = (
      untrusted.field(metadata, name, list) for name in ('shape', 'chunks')
    )
    sizes = [*shape, *chunks]
    whole = all(type(size) is int and 0 <= size < 2**48 for size in sizes)
    if not whole or len(shape) != len(chunks) or 0 in chunks:
      raise untrusted.Malformed(
        f'expected sizes and as many chunk sizes, got {shape} and {chunks}'
      )
    dot = untrusted.field(metadata, 'dimension_separator', str, '.')
    if dot not in ('.', '/'):
      raise untrusted.Malformed(f"expected '.' or '/' between, got {dot!r}")
    count = math.prod(map(_cells, shape, chunks))
    if count > _MAX_CHUNKS:
      raise untrusted.Malformed(f'{count:,} chunks, at most {_MAX_CHUNKS:,}')
  except untrusted.Malformed as error:
    raise CheckpointError(
      f'{file} is damaged ({error}): copy it again'
    ) from None
  return metadata


def _cells(size: int, chunk: int) -> int:
  return math.ceil(size / chunk)


def read(path: Path, metadata: Mapping[str, Any]) -> np.ndarray:
  """Reads an array, of which every chunk must be there.

  tensorstore takes an absent chunk for the fill value, or for zeros where
  the array has none, as T5X's have none: a lost file would go unnoticed.

  Args:
    metadata: the array's `read_metadata`.

  Raises:
    CheckpointError: a chunk is absent or damaged.
  """
  grid = [
    range(_cells(size, chunk))
    for size, chunk in zip(metadata['shape'], metadata['chunks'], strict=True)
  ]
  dot = metadata.get('dimension_separator') or '.'
  stored = 0
  for cell in itertools.product(*grid):
    chunk = path / (dot.join(map(str, cell)) or '0')
    if chunk.is_file():
      stored += chunk.stat().st_size
    elif metadata.get('fill_value') is None:
      raise CheckpointError(f'{chunk} is missing: copy the checkpoint again')
  store = {'driver': 'file', 'path': str(path.resolve())}
  with _damaged(path):
    opened = tensorstore.open({'driver': 'zarr', 'kvstore': store}).result()
    # tensorstore allocates a whole chunk, however little of it is asked for.
    chunk = math.prod(metadata['chunks']) * opened.dtype.numpy_dtype.itemsize
    _check_size(path, max(_bytes(opened), chunk), stored)
    return opened.read().result()


def open_orbax_array(folder: Path, name: str) -> tensorstore.TensorStore:
  """Opens an array of an Orbax directory, in OCDBT or in a zarr 3 directory.

  Raises:
    CheckpointError: there is none of that name, or it is damaged.
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
  with _damaged(folder / name):
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
    CheckpointError: a chunk is absent or damaged.
  """
  path = folder / name
  with _damaged(path):
    chunks = store.chunk_layout.write_chunk.shape
    cells = math.prod(map(_cells, store.shape, chunks))
    keys = [key.decode() for key in store.kvstore.list().result()]
    chunk_keys = [key for key in keys if key.rpartition('/')[2] not in _FIELDS]
    if len(chunk_keys) < cells and store.fill_value is None:
      raise CheckpointError(
        f'{path} lacks {cells - len(chunk_keys)} of {cells} chunks: copy the '
        'checkpoint again'
      )
    stored = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
    _check_size(path, _bytes(store), stored)
    return store.read().result()


# What zarr's versions keep beside the chunks, and tensorstore's names of them.
_FIELDS = ('.zarray', '.zattrs', 'zarr.json')
_DRIVERS = ('zarr', 'zarr3')


def _bytes(store: tensorstore.TensorStore) -> int:
  return math.prod(store.shape) * store.dtype.numpy_dtype.itemsize


def _check_size(path: Path, size: int, stored: int) -> None:
  """Refuses an array that cannot be in so few bytes, before it is allocated."""
  if size > _MAX_RATIO * stored + _SLACK:
    raise CheckpointError(
      f'{path} is of {size:,} bytes by its metadata and takes {stored:,} on '
      'the disk: it is damaged, copy it again'
    )


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
  """Turns tensorstore's errors into one sentence."""
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
    The array's place and form, as T5X's index has it in the array's stead.
  """
  shape = list(array.shape)
  metadata = {'chunks': shape, 'compressor': _COMPRESSOR, 'shape': shape}
  spec = {'driver': 'zarr', 'dtype': str(array.dtype), 'metadata': metadata}
  place = {'driver': 'file', 'path': str((folder / name).resolve())}
  opened = tensorstore.open(
    spec | {'kvstore': place},
    create=True,
    context=tensorstore.Context(_UNSYNCED),
  )
  opened.result().write(array).result()
  return spec | {'kvstore': {'driver': 'file', 'path': f'{name}/'}}
