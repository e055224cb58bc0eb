# SPDX-License-Identifier: Apache-2.0
"""Reads the arrays of a T5X checkpoint, which has one of three file formats.

- A directory `checkpoint_<step>` with a msgpack index `checkpoint`, whose
  leaves are arrays or name zarr directories beside it (T5X's version 3).
- A single msgpack file with all arrays in it (Flax's `save_checkpoint`).
- An Orbax directory, `checkpoint_<step>/state`. Its `_METADATA`, or in older
  versions a msgpack index of placeholders, names zarr directories or keys of
  an OCDBT database.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import numpy as np

from moepeft.checkpoints import directory
from moepeft.checkpoints.t5x import zarr
from moepeft.config.gin.checkpoint_path import (
  INDEX,
  ORBAX_METADATA,
  STEP_NAME,
  find_index,
)
from moepeft.core import untrusted
from moepeft.core.files import check_file, read_bytes
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Shape, Tree

_PLACEHOLDER = 'PLACEHOLDER://'
_TF_CHECKPOINT_PREFIX = b'model_checkpoint_path'
# Keys of an index that lead to the parameters: T5X's, Orbax's and Flax's.
_PARAM_ROOTS = (('optimizer', 'target'), ('target',), ('params',))

ReadArray = Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
  """A checkpoint whose arrays are read on demand.

  Attributes:
    path: the directory of the checkpoint, or its file if it is a single one.
    leaves: {parameter path: (shape, function that reads the array)}.
    step: the training step, 0 where the checkpoint records none.
  """

  path: Path
  leaves: dict[str, tuple[Shape, ReadArray]]
  step: int


class _OrbaxArrayName(NamedTuple):
  """The name under which Orbax stores an array."""

  name: str


def open_checkpoint(path: str) -> Checkpoint:
  """Opens the checkpoint at a path; arrays are read on demand.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged.
  """
  index = find_index(path)
  tree = (
    _read_orbax_metadata(index)
    if index.name == ORBAX_METADATA
    else _read_msgpack(index)
  )
  folder = index.parent
  leaves = {
    name: _open_leaf(name, leaf, folder)
    for name, leaf in _flatten(_find_params(tree, index), index)
  }
  is_single_file = index.name not in (INDEX, ORBAX_METADATA)
  checkpoint_path = index if is_single_file else folder
  return Checkpoint(checkpoint_path, leaves, _step(tree, index))


def _read_msgpack(index: Path) -> Any:
  """The content of a msgpack file."""
  content = read_bytes(index)
  if content.startswith(_TF_CHECKPOINT_PREFIX):
    raise CheckpointError(
      f'{index} belongs to a TensorFlow checkpoint, which is not supported: '
      "convert it with T5X's convert_tf_checkpoint, or use the model's T5X or "
      'Hugging Face checkpoint'
    )
  try:
    return flax.serialization.msgpack_restore(content)
  except Exception as error:  # msgpack, flax and NumPy each raise their own
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'{index} is truncated or not msgpack ({reason}): copy it again'
    ) from None


def _read_orbax_metadata(index: Path) -> Tree:
  """Reads Orbax's `_METADATA`: a tree of `_OrbaxArrayName`s."""
  content = directory.read_json(index)
  flat = {}
  try:
    for entry in untrusted.field(content, 'tree_metadata', dict).values():
      keys = untrusted.field(entry, 'key_metadata', list)
      parts = [str(key['key']) for key in keys if isinstance(key, dict)]
      kind = untrusted.field(entry, 'value_metadata.value_type', str, '')
      if kind not in ('Dict', 'List', 'None', 'Tuple', 'string'):
        flat['/'.join(parts)] = _OrbaxArrayName('.'.join(parts))
  except (untrusted.Malformed, KeyError) as error:
    raise CheckpointError(
      f'{index} is not the metadata of an Orbax checkpoint ({error}): copy it '
      'again'
    ) from None
  try:
    return weight_mapping.unflatten(flat)
  except (AttributeError, TypeError):
    raise CheckpointError(
      f'{index} has a key that is both an array and a parent of arrays: copy '
      'it again'
    ) from None


def _find_params(tree: Any, index: Path) -> Tree:
  """The subtree of the parameters.

  Raises:
    CheckpointError: the tree has none.
  """
  for keys in _PARAM_ROOTS:
    node = tree
    for key in keys:
      node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and node:
      # A Flax train state has the variable collection 'params' below its root.
      inner = node.get('params', node)
      return inner if isinstance(inner, Mapping) else node
  raise CheckpointError(
    f'{index} has no optimizer/target: expected the index of a T5X checkpoint'
  )


def _step(tree: Any, index: Path) -> int:
  """The step in an index, or else in the name of one of its directories."""
  for keys in (('optimizer', 'state', 'step'), ('state', 'step'), ('step',)):
    node = tree
    for key in keys:
      node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, (int, np.integer)) or (
      isinstance(node, np.ndarray) and node.size == 1 and node.dtype.kind == 'i'
    ):
      return max(int(node), 0)
  matches = (STEP_NAME.fullmatch(name) for name in index.absolute().parts[-3:])
  return next((int(match[1]) for match in matches if match), 0)


def _flatten(tree: Tree, index: Path) -> Iterator[tuple[str, Any]]:
  """(parameter path, leaf) of each leaf of a tree."""
  stack = [('', tree)]
  while stack:
    prefix, node = stack.pop()
    for key, value in node.items():
      if not isinstance(key, str):
        raise CheckpointError(
          f'{index} has the key {key!r:.60}, expected a string: copy it again'
        )
      name = f'{prefix}/{key}' if prefix else key
      if isinstance(value, Mapping) and 'driver' not in value:
        stack.append((name, value))
      else:
        yield name, value


def _open_leaf(name: str, leaf: Any, folder: Path) -> tuple[Shape, ReadArray]:
  """(shape, function that reads the array) of a leaf."""
  if isinstance(leaf, np.ndarray):
    return leaf.shape, lambda: leaf
  if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
    leaf = _OrbaxArrayName(leaf.removeprefix(_PLACEHOLDER))
  if isinstance(leaf, _OrbaxArrayName):
    return _open_orbax_array(leaf.name, folder)
  if not isinstance(leaf, Mapping):
    raise CheckpointError(
      f'{folder}: {name} is a {type(leaf).__name__} ({leaf!r:.60}), expected '
      'an array or a tensorstore spec; only T5X version 3 is supported'
    )
  try:
    path = untrusted.field(leaf.get('base', leaf), 'kvstore.path', str, '')
  except untrusted.Malformed as error:
    raise CheckpointError(
      f'{folder}: the tensorstore spec of {name} is damaged ({error}); copy '
      'it again'
    ) from None
  # Only the last part: the path may be in the bucket from which the
  # checkpoint was copied.
  return _open_zarr(folder / Path(path).name)


def _open_zarr(path: Path) -> tuple[Shape, ReadArray]:
  metadata = zarr.read_metadata(path)
  return tuple(metadata['shape']), lambda: zarr.read(path, metadata)


def _open_orbax_array(name: str, folder: Path) -> tuple[Shape, ReadArray]:
  """Opens an Orbax array in a zarr directory or an OCDBT database."""
  check_file(folder / name)
  if (folder / name / '.zarray').exists():
    return _open_zarr(folder / name)
  store = zarr.open_orbax_array(folder, name)
  return tuple(store.shape), lambda: zarr.read_orbax_array(folder, name, store)
