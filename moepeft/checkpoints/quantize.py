# SPDX-License-Identifier: Apache-2.0
"""Quantizes a base's projections, and back; see `moepeft.nn.quantization`.

Embeddings, norms, biases and the head are not quantized.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moepeft.checkpoints.hf import model as hf
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import Shape, Tree
from moepeft.nn.quantization import FORMATS


def pack(params: Tree, config: Any, kind: str, dtype: Any = None) -> Tree:
  """Quantizes the projections of a tree, one layer at a time.

  Args:
    params: host arrays, layers stacked.
    config: the config of the model family.
    kind: a key of `moepeft.nn.quantization.FORMATS`.
    dtype: the dtype of the other arrays; None keeps theirs.

  Raises:
    ValueError: the kind is unknown.
  """
  check(kind)
  flat, encode = weight_mapping.flatten(params), FORMATS[kind].encode
  packed = {}
  for path, _, inputs in _kernel_specs(config):
    layers = [encode(layer, inputs) for layer in flat.pop(path)]
    codes, scales = (np.stack(arrays) for arrays in zip(*layers, strict=True))
    packed |= {f'{path}_{kind}': codes, f'{path}_scale': scales}
  rest = {
    path: a if dtype is None else a.astype(dtype) for path, a in flat.items()
  }
  return weight_mapping.unflatten(rest | packed)


def unpack(params: Tree, config: Any, dtype: Any = 'float32') -> Tree:
  """Dequantizes a tree; other trees are returned unchanged."""
  kind = kind_of(params)
  if not kind:
    return params
  flat, decode = weight_mapping.flatten(params), FORMATS[kind].decode
  for path, shape, _ in _kernel_specs(config):
    codes, scales = flat.pop(f'{path}_{kind}'), flat.pop(f'{path}_scale')
    layers = [decode(c, s, shape) for c, s in zip(codes, scales, strict=True)]
    flat[path] = np.stack([np.asarray(layer, dtype) for layer in layers])
  return weight_mapping.unflatten(flat)


def shapes(params: Tree, config: Any, kind: str) -> Tree:
  """The shapes of the result of `pack`; allocates nothing."""
  check(kind)
  flat, number_format = weight_mapping.flatten(params), FORMATS[kind]
  for path, shape, inputs in _kernel_specs(config):
    depth = flat.pop(path).shape[0]
    layout = number_format.layout(shape[:inputs], shape[inputs:], 'd', '')
    for name, dtype in ((kind, number_format.dtype), ('scale', np.float32)):
      part_shape = layout['scale' if name == 'scale' else 'codes'][0]
      flat[f'{path}_{name}'] = jax.ShapeDtypeStruct((depth, *part_shape), dtype)
  return weight_mapping.unflatten(flat)


def check(kind: str) -> None:
  """Raises a ValueError if the kind is unknown."""
  if kind not in FORMATS:
    raise ValueError(
      "config.model.quantize is '' or one of "
      f'{", ".join(FORMATS)}; got {kind!r}'
    )


def kind_of(params: Tree) -> str:
  """The kind of a quantized tree; '' for other trees."""
  suffixes = {
    path.rpartition('kernel_')[2] for path in weight_mapping.flatten(params)
  }
  return next((kind for kind in FORMATS if kind in suffixes), '')


def parameters(params: Tree, config: Any) -> int:
  """The number of parameters of a base, quantized or not."""
  flat, kind = weight_mapping.flatten(params), kind_of(params)
  total = sum(math.prod(leaf.shape) for leaf in flat.values())
  for path, shape, _ in _kernel_specs(config) if kind else ():
    codes, scale = flat[f'{path}_{kind}'], flat[f'{path}_scale']
    total += codes.shape[0] * math.prod(shape)
    total -= math.prod(codes.shape) + math.prod(scale.shape)
  return total


def size(params: Tree) -> int:
  """The bytes of a tree's arrays or shapes."""
  return sum(
    math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    for leaf in weight_mapping.flatten(params).values()
  )


def _kernel_specs(config: Any) -> Iterator[tuple[str, Shape, int]]:
  """Yields (path in the stacked tree, shape of a layer, input axes)."""
  family = hf.family_of(config)
  sizes = family.axis_sizes(config)
  for site, (inner, outer) in family.projections(config).items():
    path = f'{weight_mapping.path_in_layers(site)}/kernel'.replace('/{l}', '')
    yield path, weight_mapping.axes_shape(inner + outer, sizes), len(inner)
