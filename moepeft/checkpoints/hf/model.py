# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Hugging Face model directories."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moepeft.checkpoints import directory
from moepeft.checkpoints.directory import LoadedCheckpoint
from moepeft.checkpoints.hf import tokenizer_files
from moepeft.models import (
  FAMILIES,
  ModelFamily,
  by_model_type,
  hf_fields,
  weight_mapping,
)
from moepeft.models.hf_tensor_names import TensorNames
from moepeft.models.weight_mapping import CheckpointError, Entry, Shape, Tree

# File patterns of unsupported formats.
_UNSUPPORTED = {
  'pytorch_model*.bin': 'a pickle',
  '*.pt': 'a pickle',
  '*.pth': 'a pickle',
  '*.h5': 'weights of TensorFlow Keras',
  '*.ckpt.index': 'a TensorFlow checkpoint',
  '*.ckpt-*.index': 'a TensorFlow checkpoint',
  'flax_model*.msgpack': "weights of transformers' Flax models",
}

_CONFIG = 'config.json'
_SINGLE_FILE, _INDEX_FILE = 'model.safetensors', 'model.safetensors.index.json'


def load(path: str, dtype: Any = None) -> LoadedCheckpoint:
  """Reads a directory, or a model by its name on the Hugging Face hub.

  Besides the result, one tensor at a time is in memory.

  Args:
    path: a directory with config.json and safetensors files (one, or several
      with an index), or else a name like 'google/t5-v1_1-base'.
    dtype: the dtype of the result, e.g. 'float32'; None keeps the files'.

  Raises:
    CheckpointError: there is no model, a file is damaged, the family is
      unknown, or names or shapes do not match config.json.
  """
  folder = find(path)
  family, fields = _read_config(folder)
  tensors = _rename_tensors(
    family.hf.tensor_names(fields), open_tensors(folder)
  )
  config = _config(folder, family, fields, tensors)
  entries = model_entries(config)
  weight_mapping.check(
    {entry.stored_name: entry.stored_shape for entry in entries},
    tensors.shapes,
    f'{folder} does not hold the model that its config.json describes',
    'use the config.json that was saved with these weights',
  )
  sizes = family.axis_sizes(config)
  params, sha256 = weight_mapping.read(
    entries, sizes, tensors.fetch, dtype, folder
  )
  return LoadedCheckpoint(config, params, sha256, str(folder))


def load_config(path: str) -> Any:
  """The config of a model, without its weights.

  If both a head and an embedding are stored, they are read and compared.
  """
  folder = find(path)
  family, fields = _read_config(folder)
  tensors = _rename_tensors(
    family.hf.tensor_names(fields), open_tensors(folder)
  )
  return _config(folder, family, fields, tensors)


def save(
  path: str,
  config: Any,
  params: Tree,
  dtype: Any = None,
  tokenizer: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
  overwrite: bool = False,
) -> None:
  """Writes a directory that `transformers` reads, atomically.

  Args:
    params: as `load` returns them; NumPy or JAX arrays.
    dtype: the dtype of the files; None keeps each array's.
    tokenizer: a directory whose tokenizer files are copied, or a GGUF file
      whose tokenizer is converted.
    max_shard_bytes: the maximum size of a file.
    overwrite: whether to replace an earlier checkpoint at `path`.

  Raises:
    CheckpointError: `params` do not fit `config`, `path` is not empty, or
      the family is unknown.
  """
  family = family_of(config)
  entries = model_entries(config)
  arrays = weight_mapping.write(entries, family.axis_sizes(config), params)
  plan = _shards(entries, params, dtype, max_shard_bytes)
  with directory.atomic_directory(path, overwrite) as output_dir:
    fields = family.hf.to_fields(config)
    dtypes = {str(_dtype(entry, params, dtype)) for entry in entries}
    if len(dtypes) == 1:
      fields |= {'dtype': dtypes.pop()}
    if family.hf.special_ids:
      fields |= tokenizer_files.special_ids(tokenizer)
    directory.write_json(output_dir / _CONFIG, fields)
    _write_shards(output_dir, plan, arrays, dtype)
    tokenizer_files.write(output_dir, tokenizer)


def model_entries(config: Any) -> tuple[Entry, ...]:
  """The entries of all tensors of a model, with Hugging Face's names."""
  family = family_of(config)
  return weight_mapping.entries(
    family.hf.rules(config), family.axis_sizes(config), family.depths(config)
  )


def family_of(config: Any) -> ModelFamily:
  """The family of a model's config."""
  return FAMILIES[config.family]


def find(path: str) -> Path:
  """A local directory, or else the snapshot of a model on the hub."""
  if Path(path).is_dir():
    return Path(path)
  check_name(path)
  try:
    import huggingface_hub

    patterns = ['*.json', '*.safetensors', *tokenizer_files.FILES]
    return Path(
      huggingface_hub.snapshot_download(path, allow_patterns=patterns)
    )
  except Exception as error:  # the hub's errors have no common type
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise CheckpointError(
      f'{path} is not a directory here and could not be fetched from the '
      f'Hugging Face hub ({reason}): check the name or download it yourself '
      'and give its directory'
    ) from None


def check_name(path: str) -> None:
  """Raises a CheckpointError if a path cannot be a name on the hub."""
  if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', path):
    raise CheckpointError(
      f'{path} is not a directory: give one with config.json and '
      f'{_SINGLE_FILE}, or a name on the Hugging Face hub'
    )


def open_tensors(folder: Path) -> directory.Tensors:
  """Opens the safetensors of a directory, a single file or several."""
  if (folder / _SINGLE_FILE).exists():
    return directory.Tensors([folder / _SINGLE_FILE])
  if (folder / _INDEX_FILE).exists():
    return directory.Tensors(_shard_files(folder))
  check_unsupported(folder)
  raise CheckpointError(
    f'{folder} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}: expected a '
    'Hugging Face model directory'
  )


def check_unsupported(folder: Path) -> None:
  """
  Raises:
    CheckpointError: the directory has weights in an unsupported format.
  """
  for pattern, kind in _UNSUPPORTED.items():
    for file in sorted(folder.glob(pattern))[:1]:
      raise CheckpointError(
        f'{folder} holds {file.name}, {kind}, and no safetensors: convert '
        'it with transformers (from_pretrained, then save_pretrained), '
        f'which writes {_SINGLE_FILE}'
      )


def _shard_files(folder: Path) -> list[Path]:
  """The files that an index names, in its directory."""
  file = folder / _INDEX_FILE
  weight_map = directory.read_json(file).get('weight_map')
  shards = weight_map.values() if isinstance(weight_map, dict) else [None]
  if not all(isinstance(n, str) and Path(n).name == n for n in shards):
    raise CheckpointError(
      f"{file} is damaged: expected file names in its 'weight_map'; copy it "
      'again'
    )
  return [folder / name for name in sorted(set(shards))]


def _read_config(folder: Path) -> tuple[ModelFamily, dict[str, Any]]:
  file = folder / _CONFIG
  fields = directory.read_json(file)
  families, model_type = by_model_type(), fields.get('model_type')
  if not isinstance(model_type, str) or model_type not in families:
    raise CheckpointError(
      f'{file} is of the family {model_type!r}; supported are '
      f'{", ".join(families)}'
    )
  conversion = families[model_type].hf
  if fields.get('quantization_config') or fields.get('quantization'):
    raise CheckpointError(
      f'{file} has quantized weights, which are not supported: use the '
      'unquantized model, and set config.model.quantize'
    )
  try:
    hf_fields.check(fields, conversion.field_types)
  except ValueError as error:
    raise CheckpointError(
      f'{file} is damaged or of another model: {error}; copy it again'
    ) from None
  return families[model_type], hf_fields.with_aliases(
    fields, conversion.aliases
  )


@dataclasses.dataclass
class _RenamedTensors:
  """Tensors by the names of the mapping rules."""

  shapes: dict[str, Shape]
  fetch: Callable[[str], np.ndarray]


def _rename_tensors(
  names: TensorNames, tensors: directory.Tensors
) -> _RenamedTensors:
  stored = names.in_rules(tensors.shapes)
  shapes = {name: tensors.shapes[stored[name]] for name in stored}
  return _RenamedTensors(shapes, lambda name: tensors.fetch(stored[name]))


def _config(
  folder: Path, family: ModelFamily, fields, tensors: _RenamedTensors
) -> Any:
  """The config from config.json and, where that is open, from the weights."""
  names = family.hf.tensor_names(fields)
  tied = _is_tied(names, fields, tensors)
  parts = {part: name in tensors.shapes for part, name in names.parts.items()}
  try:
    config = family.hf.from_fields(fields, tied)
  except CheckpointError:
    raise
  except ValueError as error:
    raise CheckpointError(
      f'{folder / _CONFIG} describes no valid model: {error}; use '
      'the one that was saved with these weights'
    ) from None
  return dataclasses.replace(config, **parts)


def _is_tied(names: TensorNames, fields, tensors: _RenamedTensors) -> bool:
  """Whether the head is tied to the embedding; removes a duplicate tensor."""
  head, embedding = names.head, names.embedding
  if head not in tensors.shapes or embedding not in tensors.shapes:
    return head not in tensors.shapes
  if fields.get('tie_word_embeddings') is False:
    return False
  if not np.array_equal(tensors.fetch(head), tensors.fetch(embedding)):
    return False
  del tensors.shapes[head]
  return True


def _dtype(entry: Entry, params: Tree, dtype: Any) -> np.dtype:
  if dtype is not None:
    return np.dtype(dtype)
  leaf = params
  for key in entry.path.split('/'):
    leaf = leaf[key]
  return np.dtype(leaf.dtype)


def _shards(entries, params, dtype, max_bytes: int) -> list[list[Entry]]:
  """Splits the tensors, in order, into files of at most `most` bytes."""
  shards, used = [[]], 0
  for entry in weight_mapping.first_parts(entries):
    size = math.prod(entry.stored_shape) * _dtype(entry, params, dtype).itemsize
    if shards[-1] and used + size > max_bytes:
      shards.append([])
      used = 0
    shards[-1].append(entry)
    used += size
  return shards


def _write_shards(
  folder: Path,
  plan: Sequence[Sequence[Entry]],
  arrays: Iterator[tuple[Entry, np.ndarray]],
  dtype: Any,
) -> None:
  weight_map, total = {}, 0
  for i, shard in enumerate(plan, 1):
    name = f'model-{i:05d}-of-{len(plan):05d}.safetensors'
    name = _SINGLE_FILE if len(plan) == 1 else name
    shard_arrays = {}
    for entry in shard:
      _, array = next(arrays)
      shard_arrays[entry.stored_name] = (
        array if dtype is None else array.astype(dtype)
      )
    # transformers requires this metadata.
    save_file(shard_arrays, folder / name, metadata={'format': 'pt'})
    total += sum(array.nbytes for array in shard_arrays.values())
    weight_map |= dict.fromkeys(shard_arrays, name)
  if len(plan) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    directory.write_json(folder / _INDEX_FILE, index)
