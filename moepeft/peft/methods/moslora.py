# SPDX-License-Identifier: Apache-2.0
"""MoSLoRA (Wu et al., arXiv:2406.11909): LoRA with a mixer in rank space.

Mixers as experts between a shared A and B are CoMoL (arXiv:2603.00573): a
mixture with about as many parameters as one LoRA.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Choices, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import (
  BaseLayer,
  contraction,
  flatten_features,
  kernel_letters,
)
from moepeft.nn.initializers import kaiming_uniform, peft_param
from moepeft.nn.numerics import to_f32
from moepeft.peft import low_rank
from moepeft.peft.method import Method
from moepeft.peft.methods import lora


class MosLora(lora.Lora):
  """y = f(x) + alpha / r (x A) M B; the base's function at first.

  Parameters: a [*in, r], b [r, *out] zeros, core [r, r] from U(-1/sqrt(r),
  1/sqrt(r)), as in the released code (the paper also has an orthogonal one).
  """

  init_weights: str = option('zero', Choices(('zero',)))

  @nn.nowrap
  def term(
    self,
    module: nn.Module,
    f: BaseLayer,
    x: Array,
    dtype: Any,
    ctx: Context,
    mixing: Any = None,
  ) -> Array:
    """As of `Lora`; each expert has a core of its own, [e, r, r]."""
    a, b, e_a, e_b = self.factors(module, f, mixing)
    e = (mixing.experts,) if mixing else ()
    r = self.rank
    letter = 'e' if e else ''
    core = peft_param(
      module, 'core', kaiming_uniform(r), (*e, r, r), f'{letter}rr'
    ).astype(dtype)
    drop = nn.Dropout(self.dropout)
    z = low_rank.down(drop(x, deterministic=not ctx.train).astype(dtype), a)
    if mixing is None:
      return low_rank.up(low_rank.down(z, core) * self.scale, b)
    weights = (mixing.weights(flatten_features(z)) * self.scale).astype(dtype)
    if e_a:
      z = jnp.einsum('bter,ero,bte->bteo', z, core, weights)
    else:
      z = jnp.einsum('btr,ero,bte->bteo', z, core, weights)
    if not e_b:
      z = jnp.sum(z, axis=-2)
    return low_rank.up(z, b)


def merge(variables, kernel: Array, *, adapter: MosLora, eqn: str) -> Array:
  """W + scale A M B, in float32."""
  _, inner, outer, _ = contraction(eqn)
  term = jnp.einsum(
    f'{inner}r,rz,z{outer}->{kernel_letters(eqn)}',
    variables['a'],
    variables['core'],
    variables['b'],
  )
  return to_f32(kernel) + adapter.scale * term


METHOD = Method(
  module=MosLora,
  roles=lora.METHOD.roles,
  additive=True,
  shareable=('a', 'b', 'ab'),
  merge=merge,
  exclusions=lora.EXCLUSIONS,
  size_option='rank',
  exact_identity=True,
)
