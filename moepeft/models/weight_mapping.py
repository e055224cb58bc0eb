# SPDX-License-Identifier: Apache-2.0
"""Rules that map the names and axes of arrays between formats.

A canonical name is a path with the number of the layer,
'encoder/layers/3/self/q/kernel'. In the model's tree, layers are stacked on
axis 0: 'encoder/layers/self/q/kernel'. `sizes` is the size of each axis letter,
`depths` the number of layers of each stack; see `family.ModelFamily`.
"""

import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  registers np.dtype('bfloat16')
import numpy as np

Tree = Any
Shape = tuple[int, ...]


class CheckpointError(ValueError):
  """A checkpoint is missing, damaged or unsupported; the text has a remedy."""


@dataclasses.dataclass(frozen=True)
class Rule:
  """An array of the model and its name and axes in another format.

  Attributes:
    name: canonical name, with `{l}` for the number of the layer.
    stored_name: the name in the other format, also with `{l}`.
    axes: the model's axes, one letter each: 'dnh'; '(nh)e' merges n and h into
      one axis, and '1' is an axis of size one.
    stored_axes: the same letters in the order of the other format: '(nh)d'; '*'
      is the axis of the parts: 'd(*nh)'.
    part: (i, count): the array is part i of `count` equal parts of the stored
      array; each part has its own rule.
  """

  name: str
  stored_name: str
  axes: str
  stored_axes: str
  part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A rule at one layer (None outside of layers), with its shapes."""

  rule: Rule
  layer: int | None
  name: str
  stored_name: str
  shape: Shape
  stored_shape: Shape

  @property
  def path(self) -> str:
    """The path in the stacked tree."""
    return self.rule.name.replace('/{l}', '')


def path_in_layers(site: str) -> str:
  """'decoder/self/q' -> 'decoder/layers/{l}/self/q'."""
  stack, rest = site.split('/', 1)
  return f'{stack}/layers/{{l}}/{rest}'


def entries(
  rules: Sequence[Rule], sizes: Mapping[str, int], depths: Mapping[str, int]
) -> tuple[Entry, ...]:
  """The entries of all rules, in order of rules and layers.

  Args:
    sizes: {axis letter: size}.
    depths: {path before '/layers/': number of layers}.
  """
  layer_entries = []
  for rule in rules:
    shape = axes_shape(rule.axes, sizes)
    stored_shape = axes_shape(rule.stored_axes, {**sizes, '*': rule.part[1]})
    stack = rule.name.partition('/layers/')[0]
    for layer in range(depths[stack]) if '{l}' in rule.name else [None]:
      name, stored_name = (
        text.replace('{l}', str(layer))
        for text in (rule.name, rule.stored_name)
      )
      layer_entries.append(
        Entry(rule, layer, name, stored_name, shape, stored_shape)
      )
  return tuple(layer_entries)


def module_names(
  rules: Sequence[Rule], sizes: Mapping[str, int], depths: Mapping[str, int]
) -> set[str]:
  """Every module with a weight, 'model.layers.0.self_attn.q_proj'."""
  return {
    entry.stored_name.removesuffix('.weight')
    for entry in entries(rules, sizes, depths)
    if entry.stored_name.endswith('.weight')
  }


def axes_shape(axes: str, sizes: Mapping[str, int]) -> Shape:
  """'(nh)d' -> (n * h, d)."""
  return tuple(
    math.prod(_size(letter, sizes) for letter in group)
    for group in _groups(axes)
  )


def rearrange(
  array: np.ndarray, source: str, target: str, sizes: Mapping[str, int]
) -> np.ndarray:
  """Reorders axes, '(nh)d' -> 'dnh'; returns a view if possible."""
  source_letters, target_letters = (
    [a for group in _groups(axes) for a in group if a != '1']
    for axes in (source, target)
  )
  separated = array.reshape([sizes[a] for a in source_letters])
  transposed = separated.transpose(
    [source_letters.index(a) for a in target_letters]
  )
  return transposed.reshape(axes_shape(target, sizes))


def _groups(axes: str) -> list[str]:
  groups = re.findall(r'\([\w*]+\)|[\w*]', axes)
  return [group.strip('()') for group in groups]


def _size(letter: str, sizes: Mapping[str, int]) -> int:
  return 1 if letter == '1' else sizes[letter]


def read_part(array: np.ndarray, rule: Rule, sizes) -> np.ndarray:
  """The part of a stored array that a rule maps, with the model's axes."""
  if '*' not in rule.stored_axes:
    return rearrange(array, rule.stored_axes, rule.axes, sizes)
  i, count = rule.part
  parts = {**sizes, '*': count}
  return rearrange(array, rule.stored_axes, f'*{rule.axes}', parts)[i]


def first_parts(expected: Sequence[Entry]) -> list[Entry]:
  """The entry of the first part of each stored array."""
  return [entry for entry in expected if entry.rule.part[0] == 0]


def check_finite(name: str, array: np.ndarray, path: Any) -> None:
  """
  Args:
    path: the file of the array, for messages.

  Raises:
    CheckpointError: the array is not numeric, or has NaN or infinity.
  """
  try:
    # bfloat16 and similar types have NumPy's kind V.
    is_finite = array.dtype.kind in 'fiuV' and _is_finite(array)
    is_numeric = array.dtype.kind in 'fiuV'
  except TypeError:
    is_finite = is_numeric = False
  if is_finite:
    return
  if not is_numeric:
    raise CheckpointError(
      f'{name} in {path} is of the type {array.dtype}, expected numbers: the '
      'file is damaged or of another model'
    )
  count = int(np.count_nonzero(~np.isfinite(array.astype(np.float32))))
  raise CheckpointError(
    f'{name} in {path} holds {count:,} numbers of {array.size:,} that are NaN '
    'or infinite: the file is damaged or training had diverged before it was '
    'saved; copy it again, or take an earlier checkpoint'
  )


# The exponent bits of two-byte types, all set in NaN and infinity.
_EXPONENTS = {'float16': 0x7C00, 'bfloat16': 0x7F80}
# Elements that are checked at once, to limit temporary memory.
_BLOCK = 2**22


def _is_finite(array: np.ndarray) -> bool:
  exponent = _EXPONENTS.get(array.dtype.name)
  flat = array.reshape(-1)
  for start in range(0, flat.size, _BLOCK):
    block = flat[start : start + _BLOCK]
    if exponent is None:
      is_finite = np.isfinite(block).all()
    else:
      bits = np.ascontiguousarray(block).view(np.uint16) & exponent
      is_finite = (bits != exponent).all()
    if not is_finite:
      return False
  return True


def read(
  expected: Sequence[Entry],
  sizes: Mapping[str, int],
  fetch: Callable[[str], np.ndarray],
  dtype: Any = None,
  path: Any = 'the file',
) -> tuple[Tree, str]:
  """Builds the stacked tree; one stored array at a time is in memory.

  Args:
    fetch: stored name -> stored array.
    dtype: the dtype of the result; None keeps each array's.
    path: the file, for messages.

  Returns:
    (nested dict of NumPy arrays, content hash); the hash does not depend on
    `dtype`.

  Raises:
    CheckpointError: the layers of an array differ in dtype and `dtype` is None,
      or an array has NaN or infinity.
  """
  flat, lines = {}, []
  layers = collections.Counter(entry.path for entry in expected)
  for entry in expected:
    array = fetch(entry.stored_name)
    check_finite(entry.stored_name, array, path)
    rule = entry.rule
    part = read_part(array, rule, sizes)
    lines.append(_line(entry.name, part))
    if entry.layer is None:
      flat[entry.path] = np.array(part, dtype=dtype or part.dtype, order='C')
      continue
    if entry.path not in flat:
      shape = (layers[entry.path], *entry.shape)
      flat[entry.path] = np.empty(shape, dtype or array.dtype)
    if dtype is None and array.dtype != flat[entry.path].dtype:
      raise CheckpointError(
        f'{entry.stored_name} is {array.dtype}, but earlier layers are '
        f'{flat[entry.path].dtype}; pass a dtype for all of them'
      )
    flat[entry.path][entry.layer] = part
  return unflatten(flat), _digest(lines)


def write(
  expected: Sequence[Entry], sizes: Mapping[str, int], tree: Tree
) -> Iterator[tuple[Entry, np.ndarray]]:
  """Yields (entry, contiguous array) of each stored array.

  The entry of an array in parts is that of the first part.

  Raises:
    CheckpointError: the arrays of `tree` are not the expected ones.
  """
  flat = flatten(tree)
  check(
    stacked_shapes(expected),
    {path: tuple(np.shape(leaf)) for path, leaf in flat.items()},
    'the tree to be written does not fit its config',
    'write it with the config that it was made for',
  )
  return _write(expected, sizes, flat)


def _write(expected, sizes, flat):
  parts = collections.defaultdict(list)
  for entry in expected:
    parts[entry.stored_name].append(entry)
  host_arrays = {}
  for entry in first_parts(expected):
    array_parts = parts[entry.stored_name]
    # Reused by the layers of a stack, to copy it from the device once.
    host_arrays = {
      part.path: host_arrays[part.path]
      if part.path in host_arrays
      else np.asarray(flat[part.path])
      for part in array_parts
    }
    stored = _join_parts(array_parts, host_arrays, sizes)
    # safetensors ignores strides.
    yield entry, np.ascontiguousarray(stored)


def _join_parts(parts, host_arrays, sizes):
  """The stored array of the entries of its parts, which may be in any order."""
  arrays = [
    host_arrays[part.path]
    if part.layer is None
    else host_arrays[part.path][part.layer]
    for part in sorted(parts, key=lambda part: part.rule.part)
  ]
  rule = parts[0].rule
  if len(parts) == 1:
    return rearrange(arrays[0], rule.axes, rule.stored_axes, sizes)
  # The letters of the first part apply to all: parts have equal sizes.
  sizes = {**sizes, '*': len(parts)}
  return rearrange(np.stack(arrays), f'*{rule.axes}', rule.stored_axes, sizes)


def stacked_shapes(expected: Sequence[Entry]) -> dict[str, Shape]:
  """{path: shape} of all arrays of the stacked tree."""
  layers = collections.Counter(entry.path for entry in expected)
  return {
    e.path: e.shape if e.layer is None else (layers[e.path], *e.shape)
    for e in expected
  }


def check(
  expected: Mapping[str, Shape],
  actual: Mapping[str, Shape],
  problem: str,
  advice: str,
) -> None:
  """Raises a CheckpointError with a diff if the shapes differ.

  Lines with '-' are expected only, lines with '+' are actual only.
  """
  lines = []
  for name in sorted(expected.keys() | actual.keys()):
    if expected.get(name) != actual.get(name):
      for sign, side in (('-', expected), ('+', actual)):
        if name in side:
          lines.append(f'{sign} {name} {list(side[name])}')
  if not lines:
    return
  max_lines = 40
  rest = (
    [f'... and {len(lines) - max_lines} more lines']
    if lines[max_lines:]
    else []
  )
  text = '\n'.join(lines[:max_lines] + rest)
  raise CheckpointError(
    f'{problem} (- expected, + found):\n{text}\n'
    f'{advice[0].upper()}{advice[1:]}.'
  )


def content_hash(tree: Tree) -> str:
  """SHA-256 of the sorted canonical names, dtypes, shapes and bytes.

  The hash does not depend on the format. A tree with separate layers
  ('layers_3' or 'layers/3') has the hash of the stacked tree.
  """
  lines = []
  for path, leaf in flatten(tree).items():
    path = re.sub(r'/layers_(\d+)/', r'/layers/\1/', path)
    array = np.asarray(leaf)
    stack, layers, rest = path.partition('/layers/')
    if layers and not rest.split('/')[0].isdigit():
      lines += [
        _line(f'{stack}/layers/{i}/{rest}', a) for i, a in enumerate(array)
      ]
    else:
      lines.append(_line(path, array))
  return _digest(lines)


def array_hash(array: np.ndarray) -> str:
  """SHA-256 of an array's little-endian bytes in C order."""
  array = np.ascontiguousarray(array)
  if array.dtype.byteorder == '>':
    array = array.astype(array.dtype.newbyteorder('<'))
  return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _line(name: str, array: np.ndarray) -> str:
  return f'{name} {array.dtype} {list(array.shape)} {array_hash(array)}\n'


def _digest(lines: Sequence[str]) -> str:
  return hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()


def flatten(tree: Tree, prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': x}} -> {'a/b': x}."""
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f'{prefix}/{key}' if prefix else str(key))
  return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
  """{'a/b': x} -> {'a': {'b': x}}."""
  tree: Tree = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
