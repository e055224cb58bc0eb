# SPDX-License-Identifier: Apache-2.0
"""Rows of the embedding and of the head for a few tokens, as deltas.

For new chat tokens, whose rows nothing trained: a delta on each named row of
the table, and of the head's columns; with a tied head they are the same ones.
"""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import short_repr
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import COLLECTION, Constant, peft_param
from moepeft.peft.method import Method


class Tokens(nn.Module):
  """table + delta at some rows; the base's function at first.

  Parameters: delta [r, d] zeros, float32, at 'embed', and at 'head' where
  that is not tied.

  Attributes:
    new: ids of the tokens, '1|2' or '49152-49155' or both.
  """

  new: str = ''

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    rows = token_ids(self.new, f)
    if f.eqn is None:
      delta = self._delta(len(rows), f.shape[1])
      hit = x[..., None] == jnp.array(rows)
      y = f(x)
      return y + jnp.einsum(
        'btr,rd->btd', hit.astype(y.dtype), delta.astype(y.dtype)
      )
    delta = (
      self._tied(f) if f.tied_embedding else self._delta(len(rows), f.shape[0])
    )
    y = f(x)
    more = jnp.einsum(
      'btd,rd->btr',
      x,
      delta.astype(x.dtype),
      preferred_element_type=y.dtype,
    )
    return y.at[..., jnp.array(rows)].add(more)

  def _delta(self, r: int, d: int) -> Array:
    return peft_param(self, 'delta', Constant(0), (r, d), 'rd')

  def _tied(self, f: BaseLayer) -> Array:
    """The embedding's own."""
    embedding = f.tied_embedding.get_variable(COLLECTION, self.name)
    if embedding is None:
      raise ValueError(
        f"{self.name}: the head is the embedding's, so adapt both; leave its "
        'option `targets` out'
      )
    return embedding['delta']


def token_ids(text: str, f: BaseLayer) -> tuple[int, ...]:
  """'1|2' or '5-7' -> ids, in order.

  Raises:
    ValueError: it is not of that form, the ids are not in the vocabulary, or
      the site has none.
  """
  vocab = f.shape[1 if f.eqn else 0] if len(f.shape) == 2 else 0
  if f.eqn is None and not f.kernel or f.eqn and f.eqn != 'btd,dv->btv':
    raise ValueError(
      "tokens acts at 'embed' and 'head' only; leave out `targets`"
    )
  ids = set()
  for part in text.split('|'):
    low, _, high = part.strip().partition('-')
    if not low.isdecimal() or (high and not high.isdecimal()):
      raise ValueError(
        "tokens names ids like new='1|2' or new='49152-49155'; got "
        f'new={text!r}'
      )
    first, last = int(low), int(high or low)
    if not first <= last < vocab:
      raise ValueError(
        f'tokens(new={short_repr(text)}) names ids from {first} to {last}; '
        f"expected ids below {vocab}, the size of the model's vocabulary"
      )
    ids |= set(range(first, last + 1))
  return tuple(sorted(ids))


_ROLES = ('embed', 'head')

METHOD = Method(
  module=Tokens,
  roles={'official': _ROLES, 'paper': _ROLES},
  why_not=(
    'its rows are of the embedding and the head, and merging knows projections'
  ),
  not_pooled=(
    'it changes rows of the embedding and of the head, which a batch of other '
    "adapters shares; train those with method='full' and serve the result as "
    'a base of its own'
  ),
)
