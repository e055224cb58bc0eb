# SPDX-License-Identifier: Apache-2.0
"""Small adapters that only tests use, to probe what the seam can hold."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.moe.router_stats import route
from moepeft.moe.routers.softmax import Softmax
from moepeft.nn.adapter_hook import contraction
from moepeft.nn.initializers import peft_param
from moepeft.peft import low_rank
from moepeft.peft.method import Method
from moepeft.peft.methods import lora, prefix_tuning, presets


class Seen(nn.Module):
  """Notes its site and changes nothing."""

  site: str
  log: ClassVar[set] = set()

  @nn.compact
  def __call__(self, f, x, ctx):
    self.log.add(self.site)
    return f(x)


class Dora(nn.Module):
  """DoRA (Liu et al., arXiv:2402.09353): needs the frozen kernel."""

  rank: int = 2

  @nn.compact
  def __call__(self, f, x, ctx):
    inside, outside = low_rank.shapes(f, 'dora')
    a = peft_param(
      self, 'a', lora.INIT_A, (*inside, self.rank), f'{f.input_axes}r'
    )
    b = peft_param(
      self, 'b', lora.INIT_B, (self.rank, *outside), f'r{f.output_axes}'
    )
    _, inner, outer, _ = contraction(f.eqn)
    letters = f.eqn.split('->')[0].split(',')[1]
    weight = f.kernel()
    term = jnp.einsum(f'{inner}r,r{outer}->{letters}', a, b)
    axes = tuple(letters.index(c) for c in inner)

    def norm(w):
      return jnp.sqrt(jnp.sum(w * w, axis=axes))

    magnitude = peft_param(
      self, 'magnitude', lambda *_: norm(weight), outside, f.output_axes
    )
    changed = weight + term
    scale = magnitude / jax.lax.stop_gradient(norm(changed))
    return jnp.einsum(f.eqn, x, changed) * scale


class Mixture(nn.Module):
  """Experts that share a frozen feed-forward (MixLoRA, arXiv:2404.15159).

  Each has its own adapters at the sites inside, by a `vmap` of `f`.
  """

  experts: int = 3
  router: nn.Module = Softmax(3)

  @nn.compact
  def __call__(self, f, x, ctx):
    weights = route(self, self.router, x, ctx).combine_weights
    outputs = f.vmap(self.experts)(x)
    return jnp.einsum('bte,ebtd->btd', weights.astype(x.dtype), outputs)


PROBES = {
  'dora': Method(Dora, {'official': ('query', 'key', 'down')}),
  'prefix': prefix_tuning.METHOD,
  'mixture': Method(Mixture, {'official': ('mlp',)}),
  'lora': lora.METHOD,
  'molora': presets.MOLORA,
}
