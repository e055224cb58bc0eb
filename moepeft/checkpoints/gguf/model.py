# SPDX-License-Identifier: Apache-2.0
"""Reads and dequantizes models in GGUF files, llama.cpp's format.

The `gguf` package reads and dequantizes the files.
"""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from moepeft.checkpoints.directory import LoadedCheckpoint
from moepeft.core.files import check_file
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.decoder import gguf as decoder_gguf
from moepeft.models.decoder.config import DecoderConfig
from moepeft.models.weight_mapping import CheckpointError, Shape

SUFFIX = '.gguf'


def load(path: str, dtype: Any = None) -> LoadedCheckpoint:
  """Reads a file; besides the result, one tensor at a time is in memory.

  Args:
    dtype: the dtype of the result; None for float32. The content hash is that
      of the float32 arrays.

  Raises:
    CheckpointError: the file is missing or damaged, or its model or
      quantization is not supported.
  """
  file = open_file(path)
  config = file.config()
  family = FAMILIES[config.family]
  sizes = family.axis_sizes(config)
  entries = weight_mapping.entries(
    family.gguf.rules(config), sizes, family.depths(config)
  )
  optional_names = {decoder_gguf.ROPE} | (
    {decoder_gguf.HEAD} if config.tied else set()
  )
  weight_mapping.check(
    {entry.stored_name: entry.stored_shape for entry in entries},
    {n: shape for n, shape in file.shapes.items() if n not in optional_names},
    f'{path} does not hold the model that its metadata describe',
    'convert the model again',
  )
  fetch = lambda name: file.fetch_for(name, config)  # noqa: E731
  params, sha256 = weight_mapping.read(entries, sizes, fetch, dtype, path)
  return LoadedCheckpoint(config, params, sha256, path)


def load_config(path: str) -> DecoderConfig:
  """The config of a file, without reading its weights."""
  return open_file(path).config()


def metadata(path: str) -> Mapping[str, Any]:
  """The file's key-value metadata, such as 'tokenizer.chat_template'."""
  return open_file(path).metadata


def open_file(path: str) -> 'GgufFile':
  """Opens a file; tensors are read on demand.

  Raises:
    CheckpointError: the file does not exist or is damaged.
  """
  check_file(path)
  if not Path(path).is_file():
    raise CheckpointError(f'{path} does not exist: expected a GGUF file')
  stat = os.stat(path)
  return _open_cached(path, stat.st_size, stat.st_mtime_ns)


# Cached, as the vocabulary takes seconds to read, and weights, tokenizer and
# chat template all need it.
@functools.lru_cache(maxsize=1)
def _open_cached(path: str, size: int, mtime_ns: int) -> 'GgufFile':
  """`open_file`, cached by the file's size and time of change."""
  del size, mtime_ns
  try:
    reader = _open_reader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  # A truncated file raises different exception types.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'{path} is truncated, damaged or no GGUF file ({reason}): copy it again'
    ) from None
  split_count = metadata.get('split.count', 1)
  if split_count not in (0, 1):
    raise CheckpointError(
      f'{path} is one of {split_count} files of a split model: '
      'expected a whole one; join them with llama-gguf-split --merge'
    )
  return GgufFile(path, metadata, {t.name: t for t in reader.tensors})


def _open_reader(path: str) -> Any:
  """Opens a file with a reader that takes slices of a plain array.

  A vocabulary is some 100,000 of them, and numpy makes a slice of a memory map
  three times as slowly as one of an array.
  """
  import gguf

  class Reader(gguf.GGUFReader):
    @property
    def data(self):
      return self._data

    @data.setter
    def data(self, array):
      self._data = np.asarray(array)

  return Reader(path)


class GgufFile:
  """An open GGUF file.

  Attributes:
    metadata: its key-value metadata.
    shapes: {name: shape} of its tensors, in NumPy's order.
  """

  def __init__(
    self, path: str, metadata: dict[str, Any], tensors: Mapping[str, Any]
  ):
    self.path = path
    # Read-only, as the file is cached.
    self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
    self._tensors = tensors
    self.shapes: dict[str, Shape] = {
      name: tuple(int(size) for size in reversed(tensor.shape))
      for name, tensor in tensors.items()
    }

  def config(self) -> DecoderConfig:
    """The config that the file's metadata describe."""
    rope = decoder_gguf.ROPE
    factors = self.fetch(rope) if rope in self.shapes else None
    try:
      return decoder_gguf.config_from_metadata(
        FAMILIES.values(),
        self.metadata,
        self.shapes,
        self._is_tied(),
        factors,
      )
    except CheckpointError:
      raise
    except ValueError as error:
      raise CheckpointError(
        f'the metadata of {self.path} describe no valid model: {error}; '
        'convert the model again'
      ) from None

  def _is_tied(self) -> bool:
    """Whether the head is missing or equals the embedding."""
    tensors = [
      self._tensors.get(name)
      for name in (decoder_gguf.HEAD, decoder_gguf.EMBEDDING)
    ]
    if None in tensors:
      return tensors[0] is None
    head, embedding = tensors
    if head.tensor_type != embedding.tensor_type:
      return False
    return np.array_equal(head.data, embedding.data)

  def fetch(self, name: str) -> np.ndarray:
    """Reads and dequantizes a tensor to float32."""
    import gguf

    tensor = self._tensors[name]
    try:
      array = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (ValueError, TypeError, IndexError) as error:
      reason = ' '.join(str(error).split())[:200]
      raise CheckpointError(
        f'{name} of {self.path} cannot be dequantized ({reason}): it is '
        'damaged, copy it again'
      ) from None
    except NotImplementedError:
      raise CheckpointError(
        f'{name} of {self.path} is {tensor.tensor_type.name}, which the '
        'package gguf does not dequantize: use a file in another quantization'
      ) from None
    shape = self.shapes[name]
    if array.size != math.prod(shape):
      raise CheckpointError(
        f'{name} of {self.path} holds {array.size} numbers, expected shape '
        f'{list(shape)}: it is damaged, copy it again'
      )
    return np.asarray(array, np.float32).reshape(shape)

  def fetch_for(self, name: str, config: DecoderConfig) -> np.ndarray:
    """Reads a tensor in the layout of Hugging Face's files."""
    conversion = FAMILIES[config.family].gguf
    array = self.fetch(name)
    return decoder_gguf.as_stored_by_hf(name, array, conversion, config)
