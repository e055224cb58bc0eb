# SPDX-License-Identifier: Apache-2.0
"""Models in GGUF files, llama.cpp's form: read and dequantised, not written.

The `gguf` package reads the file and knows its quantisations; it is an extra
(`pip install 'moepeft[gguf]'`).
"""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
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
  """Reads a file; one tensor is in memory at a time beside the result.

  Args:
    dtype: cast to it; None for float32, which everything is dequantised to.
      The content hash is of the float32 arrays.

  Raises:
    CheckpointError: no GGUF file, a damaged one, or a model or quantisation
      that is not supported.
  """
  file = open_file(path)
  config = file.config()
  family = FAMILIES[config.family]
  sizes = family.axis_sizes(config)
  entries = weight_mapping.entries(
    family.gguf.rules(config), sizes, family.depths(config)
  )
  ignored = {decoder_gguf.ROPE} | (
    {decoder_gguf.HEAD} if config.tied else set()
  )
  weight_mapping.check(
    {entry.stored_name: entry.stored_shape for entry in entries},
    {n: shape for n, shape in file.shapes.items() if n not in ignored},
    f'{path} does not hold the model that its metadata describe',
    'convert the model again',
  )
  fetch = lambda name: file.fetch_for(name, config)  # noqa: E731
  params, sha256 = weight_mapping.read(entries, sizes, fetch, dtype, path)
  return LoadedCheckpoint(config, params, sha256, path)


def load_config(path: str) -> DecoderConfig:
  """The config of a file as `load` would return it, without its weights."""
  return open_file(path).config()


def metadata(path: str) -> Mapping[str, Any]:
  """The file's key-value pairs, 'tokenizer.chat_template' and so on."""
  return open_file(path).metadata


def package() -> ModuleType:
  """The `gguf` package.

  Raises:
    CheckpointError: it is not installed.
  """
  try:
    import gguf
  except ImportError:
    raise CheckpointError(
      'GGUF files are read with the package gguf, which is not installed: '
      "pip install 'moepeft[gguf]', or pip install gguf"
    ) from None
  return gguf


def open_file(path: str) -> 'File':
  """Opens a file; tensors are read where they are asked for.

  Raises:
    CheckpointError: there is no file, or it is damaged.
  """
  check_file(path)
  if not Path(path).is_file():
    raise CheckpointError(f'{path} does not exist: expected a GGUF file')
  stat = os.stat(path)
  return _opened(path, stat.st_size, stat.st_mtime_ns)


# The vocabulary alone takes seconds to read, and weights, tokenizer and chat
# template each need it.
@functools.lru_cache(maxsize=1)
def _opened(path: str, size: int, changed: int) -> 'File':
  """`open_file` of a file as it is now."""
  del size, changed
  reader_of = package().GGUFReader
  try:
    reader = reader_of(path)
    pairs = {name: field.contents() for name, field in reader.fields.items()}
  # What the package raises depends on where the file ends.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'{path} is truncated, damaged or no GGUF file ({reason}): copy it again'
    ) from None
  parts = pairs.get('split.count', 1)
  if parts not in (0, 1):
    raise CheckpointError(
      f'{path} is one of {parts} files of a split model: '
      'expected a whole one; join them with llama-gguf-split --merge'
    )
  return File(path, pairs, {t.name: t for t in reader.tensors})


class File:
  """An open GGUF file.

  Attributes:
    metadata: its key-value pairs.
    shapes: {name: shape} of its tensors, in NumPy's order.
  """

  def __init__(
    self, path: str, pairs: dict[str, Any], tensors: Mapping[str, Any]
  ):
    self.path = path
    # Several read it.
    self.metadata: Mapping[str, Any] = MappingProxyType(pairs)
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
        f'the metadata of {self.path} describe no model that can be: {error}; '
        'convert the model again'
      ) from None

  def _is_tied(self) -> bool:
    """Whether there is no head, or one that only repeats the embedding."""
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
    """A tensor, dequantised: float32 of its shape."""
    tensor = self._tensors[name]
    try:
      array = package().dequantize(tensor.data, tensor.tensor_type)
    except (ValueError, TypeError, IndexError) as error:
      reason = ' '.join(str(error).split())[:200]
      raise CheckpointError(
        f'{name} of {self.path} cannot be dequantised ({reason}): it is '
        'damaged, copy it again'
      ) from None
    except NotImplementedError:
      raise CheckpointError(
        f'{name} of {self.path} is {tensor.tensor_type.name}, which the '
        'package gguf does not dequantise: take a file in another quantisation'
      ) from None
    shape = self.shapes[name]
    if array.size != math.prod(shape):
      raise CheckpointError(
        f'{name} of {self.path} holds {array.size} numbers, expected shape '
        f'{list(shape)}: it is damaged, copy it again'
      )
    return np.asarray(array, np.float32).reshape(shape)

  def fetch_for(self, name: str, config: DecoderConfig) -> np.ndarray:
    """A tensor as Hugging Face's files have it."""
    form = FAMILIES[config.family].gguf
    array = self.fetch(name)
    return decoder_gguf.as_stored_by_hf(name, array, form, config)
