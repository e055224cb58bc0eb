# SPDX-License-Identifier: Apache-2.0
"""Single arrays in zarr directories (version 2), as T5X keeps them."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from moepeft.interop import files
from moepeft.models.names import CheckpointError

_COMPRESSOR = {'id': 'gzip', 'level': 1}
# Not waiting for the disk at every one of thousands of small files.
_UNSYNCED = {'file_io_sync': False}


def fields(path: Path) -> dict[str, Any]:
  """What .zarray says: 'shape', 'chunks', ..."""
  return files.read_json(path / '.zarray')


def read(path: Path, said: Mapping[str, Any]) -> np.ndarray:
  """Reads an array, of which every chunk must be there.

  tensorstore takes an absent chunk for the fill value, or for zeros where
  the array has none, as T5X's have none: a lost file would go unnoticed.

  Args:
    said: the array's `fields`.

  Raises:
    CheckpointError: a chunk is absent or damaged.
  """
  grid = [
    range(math.ceil(size / chunk))
    for size, chunk in zip(said['shape'], said['chunks'], strict=True)
  ]
  dot = said.get('dimension_separator', '.')
  for cell in itertools.product(*grid):
    chunk = path / (dot.join(map(str, cell)) or '0')
    if said.get('fill_value') is None and not chunk.is_file():
      raise CheckpointError(f'{chunk} is missing: copy the checkpoint again')
  store = {'driver': 'file', 'path': str(path.resolve())}
  try:
    opened = tensorstore.open({'driver': 'zarr', 'kvstore': store}).result()
    return opened.read().result()
  except ValueError as error:
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
