# SPDX-License-Identifier: Apache-2.0
"""Quantized kernels: int8, and the NF4 of QLoRA (arXiv:2305.14314).

In 'params', a quantized kernel is two arrays, its codes and their scales:
`kernel_int8` or `kernel_nf4`, and `kernel_scale`. A model has no option for
quantization; the names in the tree determine it. The letter g is for blocks of
inputs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Array
from moepeft.nn.adapter_hook import contraction
from moepeft.nn.initializers import Constant, param

# Inputs that share a scale in NF4, as in the paper.
BLOCK = 64
# NF4's values (appendix E): quantiles of a normal distribution divided by the
# largest, chosen so that 0 and +-1 are exact.
LEVELS = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)


def to_int8(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
  """Symmetric quantization with one scale per output.

  Args:
    inputs: the number of input axes, which are the kernel's first.

  Returns:
    codes int8 [*in, *out], scale float32 [*out].
  """
  kernel = kernel.astype(np.float32)
  scale = np.max(np.abs(kernel), axis=tuple(range(inputs))) / np.float32(127)
  codes = np.rint(kernel / np.where(scale > 0, scale, 1))
  return codes.astype(np.int8), scale


def from_int8(codes: Array, scale: Array, shape: tuple[int, ...]) -> Array:
  """Dequantizes `to_int8`: float32 [shape], error at most scale / 2."""
  del shape
  return codes.astype(jnp.float32) * scale


def to_nf4(kernel: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
  """The nearest of LEVELS, times the absolute maximum of each block.

  A block has BLOCK consecutive inputs of one output, with the inputs flattened
  to one axis; the last block may be shorter. A byte has two codes, the first in
  the high bits.

  Returns:
    codes uint8 [inputs / 2 rounded up, *out], scale float32 [g, *out].
  """
  out = kernel.shape[inputs:]
  flat = kernel.astype(np.float32).reshape(-1, *out)
  blocks = _pad_to_multiple(flat, BLOCK).reshape(-1, BLOCK, *out)
  scale = np.max(np.abs(blocks), axis=1)
  blocks = blocks / np.where(scale > 0, scale, 1)[:, None]
  boundaries = (LEVELS[1:] + LEVELS[:-1]) / 2
  codes = np.searchsorted(boundaries, blocks).astype(np.uint8)
  codes = _pad_to_multiple(codes.reshape(-1, *out)[: len(flat)], 2)
  return codes[0::2] << 4 | codes[1::2], scale


def from_nf4(codes: Array, scale: Array, shape: tuple[int, ...]) -> Array:
  """Dequantizes `to_nf4`: float32 [shape].

  The error is at most 0.152 of the block's absolute maximum, half the widest
  gap between LEVELS.
  """
  out, size = codes.shape[1:], math.prod(shape) // math.prod(codes.shape[1:])
  indices = jnp.stack([codes >> 4, codes & 15], axis=1).reshape(-1, *out)
  values = jnp.take(jnp.asarray(LEVELS), indices[:size].astype(jnp.int32))
  scale = jnp.repeat(scale, BLOCK, axis=0)[:size]
  return (values * scale).reshape(shape)


def _pad_to_multiple(array: np.ndarray, multiple: int) -> np.ndarray:
  """Pads axis 0 with zeros to a multiple."""
  padding = -len(array) % multiple
  return np.pad(array, ((0, padding), *[(0, 0)] * (array.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class QuantizationFormat:
  """A format of quantized kernels.

  Attributes:
    encode: (kernel, inputs) -> (codes, scale), on the host.
    decode: (codes, scale, shape) -> the kernel, float32.
    dtype: the dtype of the codes.
    layout: (inputs, outputs, their letters) -> {suffix: (shape, letters)} of
      codes and scale.
  """

  encode: Callable
  decode: Callable
  dtype: Any
  layout: Callable


def _layout_int8(inputs, outputs, inside: str, outside: str):
  codes = (*inputs, *outputs), inside + outside
  return {'codes': codes, 'scale': (outputs, outside)}


def _layout_nf4(inputs, outputs, inside: str, outside: str):
  # The inputs are flattened to one axis, with their first letter.
  size, letters = math.prod(inputs), inside[0] + outside
  rows = {'codes': -(-size // 2), 'scale': -(-size // BLOCK)}
  return {name: ((n, *outputs), letters) for name, n in rows.items()}


FORMATS = {
  'int8': QuantizationFormat(to_int8, from_int8, jnp.int8, _layout_int8),
  'nf4': QuantizationFormat(to_nf4, from_nf4, jnp.uint8, _layout_nf4),
}


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
  """A quantized kernel, with the `shape` and `astype` of an array.

  Attributes:
    kind: a key of FORMATS.
    shape: the kernel's shape.
  """

  kind: str
  codes: Array
  scale: Array
  shape: tuple[int, ...]

  def astype(self, dtype: Any) -> Array:
    """The dequantized kernel."""
    kernel = FORMATS[self.kind].decode(self.codes, self.scale, self.shape)
    return kernel.astype(dtype)


def quantized_kernel(
  module: nn.Module, name: str, eqn: str, shape: tuple[int, ...]
) -> QuantizedKernel | None:
  """The module's quantized kernel, or None if it is not quantized."""
  for kind, kernel_format in FORMATS.items():
    if module.has_variable('params', f'{name}_{kind}'):
      _, inside, outside, _ = contraction(eqn)
      n = len(inside)
      layout = kernel_format.layout(shape[:n], shape[n:], inside, outside)
      start = Constant(0)
      codes = param(
        module, f'{name}_{kind}', start, *layout['codes'], kernel_format.dtype
      )
      scale = param(module, f'{name}_scale', start, *layout['scale'])
      return QuantizedKernel(kind, codes, scale, shape)
  return None
