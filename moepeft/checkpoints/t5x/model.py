# SPDX-License-Identifier: Apache-2.0
"""Reads and writes T5X checkpoints, with or without the released adapters.

Optimizer states are ignored. See `moepeft.checkpoints.t5x.files` for the file
formats.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.serialization
import numpy as np

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.directory import LoadedCheckpoint
from moepeft.checkpoints.t5x import adapters as t5x_adapters
from moepeft.checkpoints.t5x import files, zarr
from moepeft.config.gin.checkpoint_path import INDEX
from moepeft.models import weight_mapping
from moepeft.models.t5 import weights as t5_weights
from moepeft.models.t5.model import T5Config
from moepeft.models.weight_mapping import CheckpointError, Shape, Tree


@dataclasses.dataclass(frozen=True)
class LoadedT5X(LoadedCheckpoint):
  """A base model in memory, and the adapter of its checkpoint.

  Attributes:
    path: the checkpoint; the latest one if a parent directory was given.
    adapter: method and 'peft' tree, or None.
    step: the training step, 0 if the checkpoint has none.
  """

  adapter: AdapterWeights | None
  step: int = 0


def load(path: str, dtype: Any = None, top_k: int | None = None) -> LoadedT5X:
  """Reads a checkpoint.

  Args:
    path: `checkpoint_<step>`, or its parent for the latest checkpoint.
    dtype: the dtype of the base; None keeps the checkpoint's.
    top_k: k of the routers, which checkpoints lack; None for all experts.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged, or names or shapes
      are not those of flaxformer's T5.
  """
  checkpoint_path, leaves, step = files.open_checkpoint(path)
  shapes = {name: shape for name, (shape, _) in leaves.items()}
  fetch = lambda name: leaves[name][1]()  # noqa: E731
  loaded = _read(shapes, fetch, str(checkpoint_path), dtype, top_k)
  return dataclasses.replace(loaded, step=step)


def load_config(path: str) -> T5Config:
  """The config of a checkpoint, without reading its weights."""
  checkpoint = files.open_checkpoint(path)
  shapes = {
    name: shape
    for name, (shape, _) in checkpoint.leaves.items()
    if not t5x_adapters.is_adapter(name)
  }
  return _config(shapes, str(checkpoint.path))


def from_arrays(
  arrays: Mapping[str, np.ndarray],
  dtype: Any = None,
  top_k: int | None = None,
  path: str = '',
) -> LoadedT5X:
  """Like `load`, from {'encoder/layers_0/attention/query/kernel': array}.

  Args:
    path: the source of the arrays, for messages.
  """
  shapes = {name: tuple(array.shape) for name, array in arrays.items()}
  return _read(shapes, arrays.__getitem__, path, dtype, top_k)


def save(
  path: str,
  config: T5Config,
  params: Tree,
  adapter: AdapterWeights | None = None,
  step: int = 1,
  overwrite: bool = False,
) -> None:
  """Writes `path`/checkpoint_<step> in T5X's format: an index and zarr arrays.

  T5X reads the step as an int32 array, and ignores a checkpoint of step 0. As
  there is no optimizer state, training in T5X needs
  RestoreCheckpointConfig.fallback_to_scratch = True; evaluation does not.

  Args:
    config, params: the base.
    adapter: written with the released code's names, in float32.
    step: the training step, at least 1.

  Raises:
    ValueError: the step is out of range.
    CheckpointError: the arrays do not fit `config`, `path` is not empty, or
      T5X cannot represent the config or the adapter.
  """
  if not 1 <= step < 2**31:
    raise ValueError(f'expected a step from 1 to 2**31 - 1, got {step}')
  _check_representable(config)
  entries = weight_mapping.entries(
    t5_weights.t5x_rules(config),
    t5_weights.axis_sizes(config),
    t5_weights.depths(config),
  )
  arrays = weight_mapping.write(entries, t5_weights.axis_sizes(config), params)
  if adapter is not None:
    arrays = itertools.chain(arrays, t5x_adapters.write(config, adapter))
  with directory.atomic_directory(path, overwrite) as output_dir:
    folder = output_dir / f'checkpoint_{step}'
    folder.mkdir()
    target = {
      entry.stored_name: zarr.write(
        folder, f'target.{entry.stored_name.replace("/", ".")}', array
      )
      for entry, array in arrays
    }
    optimizer = {
      'target': weight_mapping.unflatten(target),
      'state': {'step': np.asarray(step, np.int32)},
    }
    packed = flax.serialization.msgpack_serialize(
      {'version': 3, 'optimizer': optimizer}
    )
    (folder / INDEX).write_bytes(packed)


def check(config: Any, adapter: AdapterWeights) -> None:
  """
  Raises:
    CheckpointError: T5X cannot represent the config or the adapter.
  """
  _check_representable(config)
  for _ in t5x_adapters.write(config, adapter):
    pass


def _check_representable(config: Any) -> None:
  if not isinstance(config, T5Config):
    raise CheckpointError(
      f'T5X has no {config.family} models: expected T5; write hf instead'
    )
  if config.tied != config.scale_head or (config.activation == 'gelu') != (
    config.gated
  ):
    raise CheckpointError(
      'T5X checkpoints have no config and are read as T5 1.0 (relu) or 1.1 '
      '(gated gelu), with a scaled head if it is tied; write this model in '
      'the hf format instead'
    )


def _config(shapes: Mapping[str, Shape], path: str) -> T5Config:
  """Infers the config from shapes.

  Raises:
    CheckpointError: arrays are missing, or sizes are invalid.
  """
  try:
    return t5_weights.config_from_t5x(shapes)
  except CheckpointError:
    raise
  except (ValueError, ZeroDivisionError, IndexError) as error:
    raise CheckpointError(
      f'the shapes of {path or "the arrays"} are not of a T5 ({error}): copy '
      'the checkpoint again'
    ) from None


def _read(
  shapes: Mapping[str, Shape],
  fetch: Callable[[str], np.ndarray],
  path: str,
  dtype: Any,
  top_k: int | None,
) -> LoadedT5X:
  """Reads the base and the adapter of a flat tree."""
  base = {n: s for n, s in shapes.items() if not t5x_adapters.is_adapter(n)}
  config = _config(base, path)
  sizes = t5_weights.axis_sizes(config)
  entries = weight_mapping.entries(
    t5_weights.t5x_rules(config), sizes, t5_weights.depths(config)
  )
  weight_mapping.check(
    {entry.stored_name: entry.stored_shape for entry in entries},
    base,
    f"{path or 'the arrays'} is not one of flaxformer's T5s",
    'look for lost arrays, or for arrays of another model',
  )
  params, sha256 = weight_mapping.read(entries, sizes, fetch, dtype, path)
  adapter_shapes = {
    name: shape for name, shape in shapes.items() if name not in base
  }
  adapter = t5x_adapters.read(config, adapter_shapes, fetch, top_k, path)
  return LoadedT5X(config, params, sha256, path, adapter)
