# SPDX-License-Identifier: Apache-2.0
"""The released layers of arXiv:2309.05444 written out, whatever the speed.

T5 1.1 with LoRA, MoLoRA, (IA)^3, MoV or none, from a flat {T5X name: array}:
names and shapes say which, and how large. One operation after the other in
flaxformer's order, in the arrays' own dtype, and nothing of the package.
Throughout, `w` is that dict and `at` the T5X name of a module.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Constants of the released code and of flaxformer's T5.
ALPHA, EPS, MASKED, MAX_DISTANCE = 16, 1e-6, -1e10, 128


def logits(
  w: dict[str, Array],
  inputs: np.ndarray,
  decoder_inputs: np.ndarray,
  targets: np.ndarray,
  top_k: int | None = None,
) -> Array:
  """ids [b, s], [b, t], [b, t] -> [b, t, v]; id 0 is padding.

  Args:
    top_k: of the routers, not renormalised; None where all experts count.
  """
  source, target = inputs > 0, targets > 0
  encoded = encode(w, inputs, pairs(source, source), top_k)
  past = np.tril(np.ones((targets.shape[1], targets.shape[1]), bool))
  x = decode(
    w,
    decoder_inputs,
    pairs(target, target) & past,
    encoded,
    pairs(target, source),
    top_k,
  )
  return x @ w['decoder/logits_dense/kernel']


def mean_token_nll(logits: Array, targets: np.ndarray) -> Array:
  """Nats a real target token: [b, t, v], [b, t] -> []."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  of_target = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  real = targets > 0
  return -jnp.sum(jnp.where(real, of_target, 0)) / jnp.sum(real)


def encode(w, ids, see, top_k) -> Array:
  """ids [b, s], see bool [b, 1, s, s] -> [b, s, d]."""
  bias = masked(see) + relative_bias(w, 'encoder', ids.shape[1])
  x = w['token_embedder/embedding'][ids]
  for at in layers(w, 'encoder'):
    y = norm(w, f'{at}/pre_attention_layer_norm', x)
    x = x + attention(w, f'{at}/attention', y, y, bias, top_k)
    y = norm(w, f'{at}/pre_mlp_layer_norm', x)
    x = x + mlp(w, f'{at}/mlp', y, top_k)
  return norm(w, 'encoder/encoder_norm', x)


def decode(w, ids, see, encoded, see_source, top_k) -> Array:
  """ids [b, t], encoded [b, s, d] -> [b, t, d]."""
  bias = masked(see) + relative_bias(w, 'decoder', ids.shape[1])
  source_bias = masked(see_source)
  x = w['token_embedder/embedding'][ids]
  for at in layers(w, 'decoder'):
    y = norm(w, f'{at}/pre_self_attention_layer_norm', x)
    x = x + attention(w, f'{at}/self_attention', y, y, bias, top_k)
    y = norm(w, f'{at}/pre_cross_attention_layer_norm', x)
    cross = f'{at}/encoder_decoder_attention'
    x = x + attention(w, cross, y, encoded, source_bias, top_k)
    y = norm(w, f'{at}/pre_mlp_layer_norm', x)
    x = x + mlp(w, f'{at}/mlp', y, top_k)
  return norm(w, 'decoder/decoder_norm', x)


def attention(w, at, x, source, bias, top_k) -> Array:
  """x [b, t, d], source [b, s, d] -> [b, t, d]."""
  n = w['encoder/relpos_bias/rel_embedding'].shape[0]

  def heads(name, letter, x):
    y = project(w, at, name, f'lora_{letter}_conv', x, top_k)
    return y.reshape(*y.shape[:-1], n, -1)

  q = heads('query', 'q', x)
  k = rescale(w, f'{at}/k_conv', heads('key', 'k', source), top_k)
  v = rescale(w, f'{at}/v_conv', heads('value', 'v', source), top_k)
  a = jax.nn.softmax(jnp.einsum('btnh,bsnh->bnts', q, k) + bias, axis=-1)
  y = jnp.einsum('bnts,bsnh->btnh', a, v)
  y = y.reshape(*y.shape[:2], -1)
  return project(w, at, 'out', 'lora_output_conv', y, top_k)


def mlp(w, at, x, top_k) -> Array:
  """gelu(wi_0 x) * wi_1 x, and wo of it; wi_1 has no adapter."""
  y = project(w, at, 'wi_0', 'lora_intermediate_conv', x, top_k)
  y = rescale(w, f'{at}/intermediate_conv', jax.nn.gelu(y), top_k)
  y = y * (x @ w[f'{at}/wi_1/kernel'])
  return project(w, at, 'wo', 'lora_output_conv', y, top_k)


def project(w, at, name, adapter, x, top_k) -> Array:
  """x W, and the low-rank term of x where there is one."""
  y = x @ w[f'{at}/{name}/kernel']
  if f'{at}/{adapter}/lora_A' not in w:
    return y
  return y + low_rank(w, f'{at}/{adapter}', x, top_k)


def low_rank(w, at, x, top_k) -> Array:
  """alpha / r (x A) B, or alpha / r sum_e p_e(x) (x A_e) B_e."""
  a, b = w[f'{at}/lora_A'], w[f'{at}/lora_B']
  if a.ndim == 2:
    y = x @ a @ b
  else:
    each = jnp.einsum('btd,edr->bter', x, a)
    each = jnp.einsum('bter,erf->btef', each, b)
    y = jnp.einsum('bte,btef->btf', route(w, at, x, top_k), each)
  return y * (ALPHA / a.shape[-1])


def rescale(w, at, y, top_k) -> Array:
  """y * l, or y * sum_e p_e(y) l_e: each head by itself where y has heads."""
  if f'{at}/ia3_scaling' in w:
    return y * w[f'{at}/ia3_scaling']
  if f'{at}/mov_scaling' not in w:
    return y
  eqn = 'btne,neh->btnh' if y.ndim == 4 else 'bte,ef->btf'
  p = route(w, at, y, top_k)
  return y * jnp.einsum(eqn, p, w[f'{at}/mov_scaling'])


def route(w, at, x, top_k) -> Array:
  """softmax(x W_g), zero outside of the k largest: [..., d] -> [..., e]."""
  kernel = w[f'{at}/router/router_weights/v/kernel']
  p = jax.nn.softmax(x @ kernel, axis=-1)
  if top_k is None:
    return p
  _, largest = jax.lax.top_k(p, top_k)
  return p * jax.nn.one_hot(largest, p.shape[-1], dtype=p.dtype).sum(-2)


def norm(w, at, x) -> Array:
  """x / rms(x) * scale."""
  square = jnp.mean(jax.lax.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(square + EPS) * w[f'{at}/scale']


def relative_bias(w, stack, length) -> Array:
  """[1, n, length, length], from T5's buckets of key minus query."""
  table = w[f'{stack}/relpos_bias/rel_embedding']
  place = np.arange(length)
  ahead = place[None, :] - place[:, None]
  return table[:, buckets(ahead, table.shape[1], stack == 'encoder')][None]


def buckets(ahead, count, both_ways) -> np.ndarray:
  """Half of a direction's buckets are exact, the rest logarithmic."""
  if both_ways:
    count //= 2
    offset, distance = (ahead > 0) * count, np.abs(ahead)
  else:
    offset, distance = 0, np.maximum(-ahead, 0)
  exact = count // 2
  tiny = np.finfo(np.float32).eps
  growth = np.log(distance.astype(np.float32) / exact + tiny)
  growth = growth / np.log(MAX_DISTANCE / exact) * (count - exact)
  far = np.minimum(exact + growth.astype(np.int32), count - 1)
  return offset + np.where(distance < exact, distance, far)


def pairs(query, key) -> np.ndarray:
  """bool [b, t], [b, s] -> [b, 1, t, s]: both are real."""
  return query[:, None, :, None] & key[:, None, None, :]


def masked(see) -> Array:
  """The bias on attention's logits that leaves only `see` visible."""
  return jnp.where(see, 0.0, MASKED)


def layers(w, stack) -> list[str]:
  """['encoder/layers_0', ...] in their order."""
  actual = {
    int(n) for n in re.findall(rf'\b{stack}/layers_(\d+)/', ' '.join(w))
  }
  return [f'{stack}/layers_{i}' for i in sorted(actual)]
