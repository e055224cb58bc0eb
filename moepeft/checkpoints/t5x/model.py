# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints of T5, with or without the released code's adapters.

Only weights are read, no optimizer state. The file formats are in
`moepeft.checkpoints.t5x.files`.
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
  """A base model in memory, and the adapter that came with it.

  Attributes:
    path: the checkpoint that was read, the latest one of a parent directory.
    adapter: method and 'peft' tree, or None.
    step: the training step, 0 where the checkpoint records none.
  """

  adapter: AdapterWeights | None
  step: int = 0


def load(path: str, dtype: Any = None, top_k: int | None = None) -> LoadedT5X:
  """Reads a checkpoint.

  Args:
    path: `checkpoint_<step>`, or its parent, of which the latest is taken
      (and logged).
    dtype: cast the base to it; None keeps the checkpoint's own.
    top_k: of the routers, which no checkpoint holds; None for all experts.

  Raises:
    CheckpointError: nothing is found, something is damaged, or names or
      shapes are not those of flaxformer's T5.
  """
  checkpoint_path, leaves, step = files.open_checkpoint(path)
  shapes = {name: shape for name, (shape, _) in leaves.items()}
  fetch = lambda name: leaves[name][1]()  # noqa: E731
  loaded = _read(shapes, fetch, str(checkpoint_path), dtype, top_k)
  return dataclasses.replace(loaded, step=step)


def load_config(path: str) -> T5Config:
  """The config as `load` would infer it, without reading the weights."""
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
  """As `load`, from {'encoder/layers_0/attention/query/kernel': array}.

  Args:
    path: where the arrays are from, for messages.
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
  """Writes `path`/checkpoint_<step> as T5X does: an index and zarr arrays.

  T5X reads the step as an int32 array, and takes a checkpoint of step 0 for
  none. There is no optimizer state: T5X evaluates from it as it is, and trains
  from it with RestoreCheckpointConfig.fallback_to_scratch = True.

  Args:
    config, params: the base.
    adapter: to go along under the released code's names, in float32.
    step: the training step, at least 1.

  Raises:
    ValueError: the step is less.
    CheckpointError: the arrays do not fit `config`, `path` is not empty, or
      T5X has no words for the config or the adapter.
  """
  if not 1 <= step < 2**31:
    raise ValueError(f'expected a step from 1 to 2**31 - 1, got {step}')
  _require_known(config)
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
    CheckpointError: T5X has no words for the config or the adapter.
  """
  _require_known(config)
  for _ in t5x_adapters.write(config, adapter):
    pass


def _require_known(config: Any) -> None:
  if not isinstance(config, T5Config):
    raise CheckpointError(
      f'T5X has no words for {config.family}: expected a T5; write hf instead'
    )
  if config.tied != config.scale_head or (config.activation == 'gelu') != (
    config.gated
  ):
    raise CheckpointError(
      'T5X checkpoints hold no config: what they are read as is 1.0 (relu) '
      'or 1.1 (gated gelu), the head scaled where it is tied; write this '
      'model in the hf form instead'
    )


def _config(shapes: Mapping[str, Shape], path: str) -> T5Config:
  """The config that shapes imply.

  Raises:
    CheckpointError: arrays are absent, or the sizes cannot be.
  """
  try:
    return t5_weights.config_from_t5x(shapes)
  except CheckpointError:
    raise
  except (ValueError, ZeroDivisionError, IndexError) as error:
    raise CheckpointError(
      f'the shapes of {path or "the arrays"} are of no T5 ({error}): copy the '
      'checkpoint again'
    ) from None


def _read(
  shapes: Mapping[str, Shape],
  fetch: Callable[[str], np.ndarray],
  path: str,
  dtype: Any,
  top_k: int | None,
) -> LoadedT5X:
  """Base and adapter of one flat tree."""
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
    'look for arrays that were lost or that another model brought',
  )
  params, sha256 = weight_mapping.read(entries, sizes, fetch, dtype, path)
  rest = {name: shape for name, shape in shapes.items() if name not in base}
  adapter = t5x_adapters.read(config, rest, fetch, top_k, path)
  return LoadedT5X(config, params, sha256, path, adapter)
