# SPDX-License-Identifier: Apache-2.0
"""Soft prompts (Lester et al., arXiv:2104.08691): vectors before a text.

They are the vectors of placeholders, ids that the base's vocabulary does not
have: v, v + 1, ..., v + length - 1 for a vocabulary of v. Whoever makes ids of
texts puts them in front (`before`), of a T5's inputs and of a decoder's whole
text. So masks, positions, packing and caches know nothing of prompts, and each
of several texts in a row has its own. Without them a row is the base's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import peft_param
from moepeft.peft.method import Method

# The paper starts from the 5,000 most common tokens; tokenizers list the
# pieces of a vocabulary by how common they are.
_COMMON = 5000


class Prompt(nn.Module):
  """Vectors of its own for placeholders, f(x) for all other ids.

  With placeholders in front the function is not the base's at first: the
  prompt starts as a text of random common tokens (the paper's section 3.2,
  'sampled vocabulary').

  Parameters: vectors [r, d], float32, at 'embed', r being the length.

  Attributes:
    length: tokens of the prompt.
  """

  length: int = option(20, Range(1, 65_536))

  @property
  def prefix_length(self) -> int:
    """The vectors before every text; see `moepeft.peft.prefix`."""
    return self.length

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    if f.eqn is not None or f.kernel is None:
      raise ValueError("prompt acts at 'embed' only; leave out `targets`")
    v, vectors = f.shape[0], self.vectors(f)
    # Beyond the table there would be NaN.
    y = f(jnp.minimum(x, v - 1))
    prompt = jnp.take(vectors, jnp.clip(x - v, 0, self.length - 1), axis=0)
    return jnp.where((x >= v)[..., None], prompt.astype(y.dtype), y)

  @nn.nowrap
  def vectors(self, f: BaseLayer) -> Array:
    """The vectors of the placeholders, [r, d]."""
    return peft_param(
      self,
      'vectors',
      lambda key, shape, dtype: common(key, f.kernel(), shape[0], dtype),
      (self.length, f.shape[1]),
      'rd',
    )


def common(key: Array, table: Array, r: int, dtype: Any) -> Array:
  """r rows of a table [v, d], drawn from the first, each once if they do."""
  count = min(len(table), _COMMON)
  rows = jax.random.choice(key, count, (r,), replace=r > count)
  return table[rows].astype(dtype)


METHOD = Method(
  module=Prompt,
  roles={'official': ('embed',), 'paper': ('embed',)},
  once=True,
  size_option='length',
  why_not="its vectors are of no token that the base's vocabulary has",
)
