# SPDX-License-Identifier: Apache-2.0
"""The arrays of a T5X checkpoint in any of its forms, by their paths.

- A directory `checkpoint_<step>` with a msgpack index `checkpoint`, whose
  leaves are arrays or name zarr directories beside it (T5X's version 3).
- A single msgpack file with all arrays in it (Flax's `save_checkpoint`).
- An Orbax directory, `checkpoint_<step>/state`: its `_METADATA`, or in older
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
from moepeft.config.gin.checkpoint_path import INDEX, ORBAX, STEP, find
from moepeft.core import untrusted
from moepeft.core.files import check_file, read_bytes
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError, Shape, Tree

_PLACEHOLDER = 'PLACEHOLDER://'
_TENSORFLOW = b'model_checkpoint_path'
# Where an index keeps the weights; a Flax train state is its own root.
_ROOTS = (('optimizer', 'target'), ('target',), ('params',))

Fetch = Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
  """
  Attributes:
    folder: of the checkpoint, or its one file.
    leaves: {path of an array: its shape and what reads it}.
    step: of T5X's clock, 0 where nothing says it.
  """

  folder: Path
  leaves: dict[str, tuple[Shape, Fetch]]
  step: int


class _OrbaxArray(NamedTuple):
  """An array that Orbax keeps under a name."""

  name: str


def read(path: str) -> Checkpoint:
  """The checkpoint at a path; arrays are read where they are asked for.

  Raises:
    CheckpointError: nothing is there, or it is damaged.
  """
  index = find(path)
  tree = _metadata(index) if index.name == ORBAX else _unpacked(index)
  folder = index.parent
  leaves = {
    name: _leaf(name, leaf, folder)
    for name, leaf in _flatten(_weights(tree, index), index)
  }
  single = index.name not in (INDEX, ORBAX)
  return Checkpoint(index if single else folder, leaves, _step(tree, index))


def _unpacked(index: Path) -> Any:
  """The content of a msgpack file."""
  raw = read_bytes(index)
  if raw.startswith(_TENSORFLOW):
    raise CheckpointError(
      f'{index} is of a checkpoint of TensorFlow, which is not read: convert '
      "it with T5X's convert_tf_checkpoint, or take the model's T5X or "
      'Hugging Face form'
    )
  try:
    return flax.serialization.msgpack_restore(raw)
  except Exception as error:  # msgpack, flax and NumPy each raise their own
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise CheckpointError(
      f'{index} is truncated or not msgpack ({reason}): copy it again'
    ) from None


def _metadata(index: Path) -> Tree:
  """Orbax's `_METADATA` as a tree of the names of its arrays."""
  content = directory.read_json(index)
  flat = {}
  try:
    for entry in untrusted.field(content, 'tree_metadata', dict).values():
      keys = untrusted.field(entry, 'key_metadata', list)
      parts = [str(key['key']) for key in keys if isinstance(key, dict)]
      kind = untrusted.field(entry, 'value_metadata.value_type', str, '')
      if kind not in ('Dict', 'List', 'None', 'Tuple', 'string'):
        flat['/'.join(parts)] = _OrbaxArray('.'.join(parts))
  except (untrusted.Malformed, KeyError) as error:
    raise CheckpointError(
      f'{index} is not the metadata of an Orbax checkpoint ({error}): copy it '
      'again'
    ) from None
  try:
    return weight_mapping.unflatten(flat)
  except (AttributeError, TypeError):
    raise CheckpointError(
      f'{index} names an array and arrays below it: copy it again'
    ) from None


def _weights(tree: Any, index: Path) -> Tree:
  """The part of a tree that holds parameters."""
  for keys in _ROOTS:
    node = tree
    for key in keys:
      node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and node:
      # Flax's own train states keep the collection's name.
      inner = node.get('params', node)
      return inner if isinstance(inner, Mapping) else node
  raise CheckpointError(
    f'{index} has no optimizer/target: expected the index of a T5X checkpoint'
  )


def _step(tree: Any, index: Path) -> int:
  """The step in an index, or else in the name of a directory above it."""
  for keys in (('optimizer', 'state', 'step'), ('state', 'step'), ('step',)):
    node = tree
    for key in keys:
      node = node.get(key) if isinstance(node, Mapping) else None
    if isinstance(node, (int, np.integer)) or (
      isinstance(node, np.ndarray) and node.size == 1 and node.dtype.kind == 'i'
    ):
      return max(int(node), 0)
  above = (STEP.fullmatch(name) for name in index.absolute().parts[-3:])
  return next((int(match[1]) for match in above if match), 0)


def _flatten(tree: Tree, index: Path) -> Iterator[tuple[str, Any]]:
  stack = [('', tree)]
  while stack:
    prefix, node = stack.pop()
    for key, value in node.items():
      if not isinstance(key, str):
        raise CheckpointError(
          f'{index} has the key {key!r:.60}, expected texts: copy it again'
        )
      name = f'{prefix}/{key}' if prefix else key
      if isinstance(value, Mapping) and 'driver' not in value:
        stack.append((name, value))
      else:
        yield name, value


def _leaf(name: str, leaf: Any, folder: Path) -> tuple[Shape, Fetch]:
  """An array's shape, and what reads it."""
  if isinstance(leaf, np.ndarray):
    return leaf.shape, lambda: leaf
  if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
    leaf = _OrbaxArray(leaf.removeprefix(_PLACEHOLDER))
  if isinstance(leaf, _OrbaxArray):
    return _stored(leaf.name, folder)
  if not isinstance(leaf, Mapping):
    raise CheckpointError(
      f'{folder}: {name} is a {type(leaf).__name__} ({leaf!r:.60}), expected '
      'an array or the place of one; only T5X version 3 is read'
    )
  try:
    place = untrusted.field(leaf.get('base', leaf), 'kvstore.path', str, '')
  except untrusted.Malformed as error:
    raise CheckpointError(
      f'{folder}: the place of {name} is damaged ({error}); copy it again'
    ) from None
  # The index may remember the bucket that the checkpoint was copied from.
  return _zarr(folder / Path(place).name)


def _zarr(path: Path) -> tuple[Shape, Fetch]:
  fields = zarr.fields(path)
  return tuple(fields['shape']), lambda: zarr.read(path, fields)


def _stored(name: str, folder: Path) -> tuple[Shape, Fetch]:
  """An array of Orbax: in a zarr directory, or in an OCDBT database."""
  check_file(folder / name)
  if (folder / name / '.zarray').exists():
    return _zarr(folder / name)
  store = zarr.open_stored(folder, name)
  return tuple(store.shape), lambda: zarr.read_stored(folder, name, store)
