# SPDX-License-Identifier: Apache-2.0
"""Attention in one call of JAX's: cuDNN's kernel (Dao et al.,
arXiv:2205.14135) where that can, else XLA's."""

import functools
import re

import jax
import jax.numpy as jnp

from moepeft.core.types import Array


def attend(
  heads,
  scale: float = 1.0,
  rng=None,
  dropout: float = 0.0,
  cap: float = 0.0,
) -> Array:
  """`attention.attend` by jax.nn.dot_product_attention.

  `implementation` chooses between cuDNN's and XLA's. cuDNN's holds no array of
  queries x keys with a structured mask; XLA's always holds one.

  Args:
    heads: `attention.Heads`.

  Raises:
    ValueError: there are soft caps or dropout, which it does not know.
  """
  if cap or (rng is not None and dropout > 0):
    unsupported = 'soft caps' if cap else 'dropout in training'
    raise ValueError(
      f"config.model.attention is 'fused', which has no {unsupported}; "
      "take 'naive' or 'chunked'"
      + ('' if cap else ', or set config.model.dropout=0')
    )
  device = jax.devices()[0]
  capability = getattr(device, 'compute_capability', '')
  run = functools.partial(
    jax.nn.dot_product_attention,
    heads.q,
    heads.k,
    heads.v,
    scale=scale,
    implementation=implementation(device.platform, capability, heads),
  )
  causal_mask = heads.structured_mask
  if causal_mask is None:
    return run(bias=heads.bias, mask=heads.mask)
  return run(
    is_causal=True,
    key_value_seq_lengths=causal_mask.lengths(),
    local_window_size=(causal_mask.window - 1, 0)
    if causal_mask.window
    else None,
  )


def implementation(platform: str, capability: str, heads) -> str:
  """'cudnn' where JAX 0.10's call of cuDNN takes these heads, else 'xla'.

  Args:
    platform, capability: the device's, 'gpu' and '9.0'; of what is not
      NVIDIA's the latter is '' or no number.
  """
  t, h = heads.q.shape[1], heads.q.shape[3]
  s = heads.k.shape[1]
  if platform != 'gpu' or not re.fullmatch(r'\d+\.\d+', capability):
    return 'xla'
  # Its flash attention begins with Ampere; larger heads do with Hopper only.
  fits = float(capability) >= 8 and h <= 128 and h % 8 == 0
  half = heads.q.dtype in (jnp.bfloat16, jnp.float16)
  # It would round a bias to q's dtype, and with a mask the gradient wants
  # even lengths.
  free = heads.bias is None and (heads.mask is None or t % 2 == s % 2 == 0)
  return 'cudnn' if fits and half and free else 'xla'
