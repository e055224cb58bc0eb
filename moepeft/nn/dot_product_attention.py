# SPDX-License-Identifier: Apache-2.0
"""Attention by `jax.nn.dot_product_attention`: cuDNN's flash attention
(arXiv:2205.14135) if it supports the inputs, else XLA's."""

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

  `implementation` chooses between cuDNN and XLA. With a structured mask, cuDNN
  allocates no array of queries x keys; XLA always does.

  Args:
    heads: `attention.Heads`.

  Raises:
    ValueError: there are soft caps or dropout, which it does not support.
  """
  if cap or (rng is not None and dropout > 0):
    unsupported = 'soft caps' if cap else 'dropout in training'
    raise ValueError(
      f"config.model.attention is 'fused', which has no {unsupported}; "
      "use 'naive' or 'chunked'"
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
  """'cudnn' if JAX 0.10 supports these heads with cuDNN, else 'xla'.

  Args:
    platform: the device's platform, such as 'gpu'.
    capability: the compute capability of an NVIDIA device, such as '9.0'; ''
      or another text for other devices.
  """
  t, h = heads.q.shape[1], heads.q.shape[3]
  s = heads.k.shape[1]
  if platform != 'gpu' or not re.fullmatch(r'\d+\.\d+', capability):
    return 'xla'
  # cuDNN needs Ampere for flash attention, and Hopper for larger heads.
  has_kernel = float(capability) >= 8 and h <= 128 and h % 8 == 0
  is_half = heads.q.dtype in (jnp.bfloat16, jnp.float16)
  # cuDNN would round a bias to q's dtype, and its gradient with a mask needs
  # even lengths.
  mask_fits = heads.mask is None or t % 2 == s % 2 == 0
  supported = has_kernel and is_half and heads.bias is None and mask_fits
  return 'cudnn' if supported else 'xla'
