# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with sites, masks and a KV cache."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moepeft.core.types import Array, Context, LayerRoutings
from moepeft.nn import chunked_attention, dot_product_attention
from moepeft.nn.adapter_hook import AdapterMap, BaseLayer, apply_adapters
from moepeft.nn.attention_mask import AttentionMask, CausalMask
from moepeft.nn.linear import Linear
from moepeft.nn.norms import NormForm
from moepeft.nn.numerics import einsum_f32, softmax, to_f32


@struct.dataclass
class Heads:
  """The input of the attention core; adapters there may lengthen k and v.

  Attributes:
    q: [b, t, n, h].
    k, v: [b, s, k, h], with as many heads or fewer (grouped-query attention,
      arXiv:2305.13245): query head i uses key-value head i // (n / k).
    bias: float [1 or b, n, t, s] added to the logits, or None.
    mask: bool [b, 1, t, s], True where t attends to s, or None.
    structured_mask: replaces mask and bias without an array [t, s]: an
      `AttentionMask` for 'chunked', a `CausalMask` for 'fused'.
    causal: whether the mask lets t attend to s <= t only; static.
  """

  q: Array
  k: Array
  v: Array
  bias: Array | None = None
  mask: Array | None = None
  structured_mask: AttentionMask | CausalMask | None = None
  causal: bool = struct.field(pytree_node=False, default=False)


# Causal attention computes this many queries together, so that products stay
# large, and more where a row would have more than so many blocks of them.
_QUERIES, _MOST_BLOCKS = 64, 8


def attend(
  heads: Heads,
  scale: float = 1.0,
  rng=None,
  dropout: float = 0.0,
  cap: float = 0.0,
) -> Array:
  """softmax(q k * scale + bias, masked) v -> [b, t, n, h].

  Logits and softmax are in float32, because bfloat16 rounds logits of 64 to
  halves. The product of weights and v is in q's dtype. Causal attention leaves
  out most of the keys that a block of queries does not see.

  Args:
    rng: the key of attention dropout, or None for none.
    cap: the soft cap, cap * tanh(logits / cap), before the bias (Gemma 2,
      arXiv:2408.00118); 0 for none.
  """
  (b, t, n, _), s = heads.q.shape, heads.k.shape[1]
  keep = None
  if rng is not None and dropout > 0:
    keep = jax.random.bernoulli(rng, 1 - dropout, (b, n, t, s))
  # An adapter may have added keys.
  if not heads.causal or t != s:
    return _attend(heads, keep, scale, dropout, cap)
  size = max(_QUERIES, -(-t // _MOST_BLOCKS))
  blocks = [
    _attend(*_queries(heads, keep, i, i + size), scale, dropout, cap)
    for i in range(0, t, size)
  ]
  return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def _queries(
  heads: Heads, keep: Array | None, start: int, stop: int
) -> tuple[Heads, Array | None]:
  """Queries `start` to `stop`, with the keys that the last of them sees."""

  def of_pairs(a):
    return None if a is None else a[..., start:stop, :stop]

  queries = heads.replace(
    q=heads.q[:, start:stop],
    k=heads.k[:, :stop],
    v=heads.v[:, :stop],
    bias=of_pairs(heads.bias),
    mask=of_pairs(heads.mask),
  )
  return queries, of_pairs(keep)


def _attend(
  heads: Heads, keep: Array | None, scale: float, dropout: float, cap: float
) -> Array:
  """`attend` with all keys; keep, bool [b, n, t, s], is False if dropped."""
  b, t, n, h = heads.q.shape
  # Heads before positions, the order in which products read and write them;
  # a key head has one product with all queries of its n / k query heads.
  q, k, v = (a.swapaxes(1, 2) for a in (heads.q, heads.k, heads.v))
  q = q.reshape(b, k.shape[1], -1, h)
  logits = einsum_f32('bkqh,bksh->bkqs', q, k).reshape(b, n, t, -1)
  logits = logits * scale
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  if heads.bias is not None:
    logits += to_f32(heads.bias)
  if heads.mask is not None:
    # Finite, so that the softmax of a row without any key is finite too.
    logits = jnp.where(heads.mask, logits, -1e9)
  weights = softmax(logits).astype(heads.q.dtype)
  if keep is not None:
    weights = jnp.where(keep, weights / (1 - dropout), 0).astype(weights.dtype)
  weights = weights.reshape(*q.shape[:3], -1)
  y = jnp.einsum('bkqs,bksh->bkqh', weights, v)
  return y.reshape(b, n, t, h).swapaxes(1, 2)


# The values of config.model.attention.
IMPLEMENTATIONS = {
  'naive': attend,
  'chunked': chunked_attention.attend,
  'fused': dot_product_attention.attend,
}


def check_implementation(implementation: str) -> None:
  """Raises a ValueError if there is no such implementation."""
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'config.model.attention is one of {", ".join(IMPLEMENTATIONS)}; got '
      f'{implementation!r}'
    )


def attention_mask(
  query: Array,
  key: Array,
  query_segments=None,
  key_segments=None,
  causal: bool = False,
  window: int = 0,
) -> Array:
  """Mask [b, 1, t, s] of real keys in the same segment, optionally causal.

  Args:
    query: bool [b, t], key: bool [b, s], True on real tokens.
    query_segments, key_segments: int [b, t], [b, s]; None if not packed.
    causal: whether t attends to s <= t only.
    window: with `causal`, the maximum number of tokens that t attends to,
      itself included (arXiv:2310.06825); 0 for all.
  """
  mask = jnp.broadcast_to(key[:, None, :], (*query.shape, key.shape[1]))
  if query_segments is not None:
    mask &= query_segments[:, :, None] == key_segments[:, None, :]
  if causal:
    all_pairs = jnp.ones(mask.shape[1:], bool)
    mask &= jnp.tril(all_pairs)
    if window:
      mask &= ~jnp.tril(all_pairs, -window)
  return mask[:, None]


class Attention(nn.Module):
  """Sites below `site`: norm, q, k, v, core (whose input is `Heads`), o.

  Attributes:
    scale: the factor of the logits.
    q_stddev: q's stddev at initialization; None for that of k and v.
    bias: whether q, k, v and o have biases.
    implementation: a key of IMPLEMENTATIONS.
  """

  d_model: int
  heads: int
  head_dim: int
  site: str
  adapter_map: AdapterMap
  scale: float = 1.0
  dropout: float = 0.0
  norm_form: NormForm = NormForm()
  q_stddev: float | None = None
  bias: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  implementation: str = 'naive'

  def setup(self):
    d, n, h = self.d_model, self.heads, self.head_dim

    def linear(name, eqn, shape, stddev):
      return Linear(
        eqn,
        shape,
        f'{self.site}/{name}',
        self.adapter_map,
        stddev=stddev,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        bias=self.bias,
      )

    project = 'btd,dnh->btnh'
    self.q = linear('q', project, (d, n, h), self.q_stddev or d**-0.5)
    self.k = linear('k', project, (d, n, h), d**-0.5)
    self.v = linear('v', project, (d, n, h), d**-0.5)
    self.core = Core(
      f'{self.site}/core',
      self.adapter_map,
      self.scale,
      self.dropout,
      implementation=self.implementation,
    )
    self.o = linear('o', 'btnh,nhd->btd', (n, h, d), (n * h) ** -0.5)
    # The block calls the norm, so that the sublayer's site has normed input.
    site = f'{self.site}/norm'
    self.norm = self.norm_form.at(site, self.adapter_map, self.param_dtype)

  def __call__(
    self,
    x: Array,
    ctx: Context,
    bias: Array | None = None,
    mask: Array | None = None,
    source: Array | None = None,
    source_ctx: Context | None = None,
  ) -> Array:
    """x [b, t, d] -> [b, t, d].

    Args:
      source: [b, s, d], the input of keys and values in cross-attention; None
        for self-attention.
      source_ctx: the context of `source`, with its token mask.
    """
    q = self.q(x, ctx)
    if source is None:
      k, v = self.k(x, ctx), self.v(x, ctx)
      if ctx.decode:
        k, v = self._update_cache(k, v, ctx)
    else:
      source_ctx = source_ctx.replace(
        layer=ctx.layer,
        layer_count=ctx.layer_count,
        # Sites that read the source have routings of its tokens.
        layer_routings=ctx.layer_routings and LayerRoutings(),
      )
      k, v = self._cross_keys_values(source, source_ctx, ctx.decode)
    return self.o(self.core(Heads(q, k, v, bias, mask), ctx), ctx)

  def _update_cache(self, k: Array, v: Array, ctx: Context):
    """Writes keys and values at ctx.index, and returns the cache."""
    b, _, heads, h = k.shape
    caches = []
    for name, new in (('k', k), ('v', v)):
      # Heads before positions, the order in which products read them.
      empty = jnp.zeros((b, heads, ctx.cache_length, h), new.dtype)
      cache = self.get_variable('cache', f'self_{name}', empty)
      cache = jax.lax.dynamic_update_slice_in_dim(
        cache, new.swapaxes(1, 2), ctx.index, axis=2
      )
      self.put_variable('cache', f'self_{name}', cache)
      caches.append(cache.swapaxes(1, 2))
    return caches

  def _cross_keys_values(self, source: Array, ctx: Context, decode: bool):
    """Keys and values of the source; decoding computes them once."""
    if not decode:
      return self.k(source, ctx), self.v(source, ctx)
    caches = []
    for name, project in (('cross_k', self.k), ('cross_v', self.v)):
      if not self.has_variable('cache', name):
        cache = project(source, ctx).swapaxes(1, 2)
        self.put_variable('cache', name, cache)
      caches.append(self.get_variable('cache', name).swapaxes(1, 2))
    return caches


class Core(nn.Module):
  """The site around one of IMPLEMENTATIONS."""

  site: str
  adapter_map: AdapterMap
  scale: float = 1.0
  dropout: float = 0.0
  cap: float = 0.0
  implementation: str = 'naive'

  @nn.compact
  def __call__(self, heads: Heads, ctx: Context) -> Array:
    has_dropout = ctx.train and self.dropout > 0
    rng = self.make_rng('dropout') if has_dropout else None
    implementation = IMPLEMENTATIONS[self.implementation]
    f = BaseLayer(
      lambda heads: implementation(
        heads, self.scale, rng, self.dropout, self.cap
      ),
      output_axes='nh',
    )
    return apply_adapters(self, self.adapter_map, self.site, f, heads, ctx)
