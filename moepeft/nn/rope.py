# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al., arXiv:2104.09864) and its scalings.

The pairs are (x_i, x_{i + h/2}), as in Hugging Face's checkpoints. Frequencies
are constants of the program.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Array
from moepeft.nn.numerics import to_f32

KINDS = ('default', 'linear', 'llama3', 'yarn')


@dataclasses.dataclass(frozen=True)
class Rope:
  """The rope_parameters of Hugging Face's configs.

  Attributes:
    theta: rope_theta.
    kind: rope_type, 'default', 'linear' (arXiv:2306.15595), 'llama3' (Llama
      3.1) or 'yarn' (arXiv:2309.00071).
    factor: the factor that extends the context; 1 changes nothing.
    original: original_max_position_embeddings, the context in tokens before
      the extension (llama3, yarn).
    low, high: llama3's low_freq_factor and high_freq_factor.
    fast, slow: yarn's beta_fast and beta_slow, in rotations over `original`.
    attention: yarn's attention_factor of queries and keys; 0 for
      0.1 ln(factor) + 1.
    truncate: whether yarn's bounds are rounded to whole dimensions.
  """

  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
  original: int = 8192
  low: float = 1.0
  high: float = 4.0
  fast: float = 32.0
  slow: float = 1.0
  attention: float = 0.0
  truncate: bool = True

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'rope is one of {", ".join(KINDS)}; got {self.kind!r}')


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
  """(radians per position, float32 [h / 2]; the factor of queries and keys)."""
  base = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if rope.kind == 'linear':
    frequencies, scale = base / rope.factor, 1.0
  elif rope.kind == 'llama3':
    frequencies, scale = _llama3(rope, base), 1.0
  elif rope.kind == 'yarn':
    frequencies = _yarn(rope, base, head_dim)
    scale = rope.attention or 0.1 * math.log(max(rope.factor, 1)) + 1
  else:
    frequencies, scale = base, 1.0
  return frequencies.astype(np.float32), scale


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
  """Divides low frequencies by the factor, and interpolates to high ones."""
  rotations = rope.original * base / (2 * math.pi)
  smooth = np.clip((rotations - rope.low) / (rope.high - rope.low), 0, 1)
  return smooth * base + (1 - smooth) * base / rope.factor


def _yarn(rope: Rope, base: np.ndarray, head_dim: int) -> np.ndarray:
  """Divides low frequencies by the factor, and ramps to unchanged high ones."""

  def dimension(rotations):
    # The dimension with so many rotations over the original context.
    wavelength = rope.original / (rotations * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

  first, last = dimension(rope.fast), dimension(rope.slow)
  if rope.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_dim - 1)
  # For very short contexts, the bounds are in the wrong order; the result is
  # that of transformers.
  ramp = (np.arange(head_dim // 2) - first) / (last - first or 1e-3)
  ramp = np.clip(ramp, 0, 1)
  return ramp * base / rope.factor + (1 - ramp) * base


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
  """Rotates x [b, t, n, h] by its positions int [b, t]; float32 inside."""
  radians, scale = frequencies(rope, x.shape[-1])
  angles = positions[..., None].astype(jnp.float32) * radians
  cos, sin = (f(angles)[:, :, None] * scale for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(to_f32(x), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
