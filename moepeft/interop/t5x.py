# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints of T5, with or without the released code's adapters.

A checkpoint is a directory `checkpoint_<step>` with a msgpack index, whose
leaves are arrays or name zarr directories beside it (T5X's version 3). Only
weights are read, no optimizer state.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
from absl import logging

from moepeft.interop import files, released, zarr
from moepeft.interop.adapter import Adapter
from moepeft.models import names, t5_names
from moepeft.models.names import CheckpointError, Shape, Tree
from moepeft.models.t5 import T5Config

INDEX = 'checkpoint'

Fetch = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A base model in memory, and the adapter that came with it.

  Attributes:
    config, params, sha256: as in `interop.hf.Loaded`.
    path: the checkpoint that was read, the latest one of a parent directory.
    adapter: method and 'peft' tree, or None.
  """

  config: T5Config
  params: Tree
  sha256: str
  path: str
  adapter: Adapter | None


def load(path: str, dtype: Any = None, top_k: int | None = None) -> Loaded:
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
  folder, leaves = _open(path)
  shapes = {name: shape for name, (shape, _) in leaves.items()}
  fetch = lambda name: leaves[name][1]()  # noqa: E731
  return _read(shapes, fetch, str(folder), dtype, top_k)


def load_config(path: str) -> T5Config:
  """The config as `load` would infer it, without reading the weights."""
  _, leaves = _open(path)
  return t5_names.config_from_t5x(
    {
      name: shape
      for name, (shape, _) in leaves.items()
      if not released.is_adapter(name)
    }
  )


def from_arrays(
  arrays: Mapping[str, np.ndarray],
  dtype: Any = None,
  top_k: int | None = None,
  path: str = '',
) -> Loaded:
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
  adapter: Adapter | None = None,
  step: int = 0,
  overwrite: bool = False,
) -> None:
  """Writes `path`/checkpoint_<step> as T5X does: an index and zarr arrays.

  There is no optimizer state in it: T5X evaluates from it as it is, and
  trains from it with RestoreCheckpointConfig.fallback_to_scratch = True.

  Args:
    config, params: the base.
    adapter: to go along under the released code's names, in float32.
    step: of T5X's clock.

  Raises:
    CheckpointError: the arrays do not fit `config`, `path` is not empty, or
      T5X has no words for the config or the adapter.
  """
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
  wanted = names.entries(
    t5_names.t5x_rules(config),
    t5_names.sizes(config),
    t5_names.depths(config),
  )
  arrays = names.write(wanted, t5_names.sizes(config), params)
  if adapter is not None:
    arrays = itertools.chain(arrays, released.write(config, adapter))
  with files.directory(path, overwrite) as made:
    folder = made / f'checkpoint_{step}'
    folder.mkdir()
    target = {
      entry.their_name: zarr.write(
        folder, f'target.{entry.their_name.replace("/", ".")}', array
      )
      for entry, array in arrays
    }
    optimizer = {
      'target': names.unflatten(target),
      'state': {'step': step, 'param_states': {}},
    }
    packed = flax.serialization.msgpack_serialize(
      {'version': 3, 'optimizer': optimizer}
    )
    (folder / INDEX).write_bytes(packed)


def find(path: str) -> Path:
  """The index file of a checkpoint, or of the latest one inside `path`."""
  folder = Path(path)
  if (folder / INDEX).is_file():
    return folder / INDEX
  steps = {}
  for child in folder.glob('checkpoint_*'):
    match = re.fullmatch(r'checkpoint_(\d+)', child.name)
    if match and (child / INDEX).is_file():
      steps[int(match[1])] = child
  if not steps:
    raise CheckpointError(
      f'{path} is no T5X checkpoint: expected a directory checkpoint_<step> '
      f'with a file {INDEX!r} in it, or one that holds such directories'
    )
  latest = steps[max(steps)]
  logging.info('%s: reading the latest checkpoint, %s', path, latest.name)
  return latest / INDEX


def _open(path: str) -> tuple[Path, dict[str, tuple[Shape, Fetch]]]:
  """The checkpoint's directory, and each array's shape and reader."""
  index = find(path)
  return index.parent, {
    name: _leaf(name, leaf, index.parent)
    for name, leaf in _flatten(_weights(index))
  }


def _weights(index: Path) -> Tree:
  """The part of the index that holds parameters."""
  try:
    tree = flax.serialization.msgpack_restore(index.read_bytes())
  except Exception as error:  # msgpack, flax and NumPy each raise their own
    raise CheckpointError(
      f'{index} is truncated or not msgpack ({error}): copy it again'
    ) from None
  for keys in (('optimizer', 'target'), ('target',), ('params',)):
    node = tree
    for key in keys:
      node = node.get(key) if isinstance(node, Mapping) else None
    if node:
      # Flax's own train states keep the collection's name.
      return node.get('params', node)
  raise CheckpointError(
    f'{index} has no optimizer/target: expected the index of a T5X checkpoint'
  )


def _flatten(tree: Tree, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    name = f'{prefix}/{key}' if prefix else key
    if isinstance(value, Mapping) and 'driver' not in value:
      yield from _flatten(value, name)
    else:
      yield name, value


def _leaf(name: str, leaf: Any, folder: Path) -> tuple[Shape, Fetch]:
  """An array's shape, and what reads it."""
  if isinstance(leaf, np.ndarray):
    return leaf.shape, lambda: leaf
  if not isinstance(leaf, Mapping):
    raise CheckpointError(
      f'{folder}: {name} is a {type(leaf).__name__} ({leaf!r:.60}), expected '
      'an array or the place of one; only T5X version 3 is read'
    )
  place = leaf.get('base', leaf).get('kvstore', {}).get('path', '')
  # The index may remember the bucket that the checkpoint was copied from.
  path = folder / Path(place).name
  fields = zarr.fields(path)
  return tuple(fields['shape']), lambda: zarr.read(path, fields)


def _read(
  shapes: Mapping[str, Shape],
  fetch: Callable[[str], np.ndarray],
  path: str,
  dtype: Any,
  top_k: int | None,
) -> Loaded:
  """Base and adapter of one flat tree."""
  base = {n: s for n, s in shapes.items() if not released.is_adapter(n)}
  config = t5_names.config_from_t5x(base)
  sizes = t5_names.sizes(config)
  wanted = names.entries(
    t5_names.t5x_rules(config), sizes, t5_names.depths(config)
  )
  names.check(
    {entry.their_name: entry.their_shape for entry in wanted},
    base,
    f"{path or 'the arrays'} is not one of flaxformer's T5s",
    'look for arrays that were lost or that another model brought',
  )
  params, sha256 = names.read(wanted, sizes, fetch, dtype, path)
  rest = {name: shape for name, shape in shapes.items() if name not in base}
  adapter = released.read(config, rest, fetch, top_k, path)
  return Loaded(config, params, sha256, path, adapter)
