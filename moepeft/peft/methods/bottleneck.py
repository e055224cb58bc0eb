# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters, after a sublayer or beside it.

Houlsby et al., arXiv:1902.00751 (sequential, after the attention and the
feed-forward); He et al., arXiv:2110.04366 (parallel).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Choices, Range, option
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import Constant, Normal, peft_param
from moepeft.nn.mlp import ACTIVATIONS
from moepeft.peft.low_rank import DROPOUT, down, up
from moepeft.peft.method import Method

_ZERO = Constant(0)
# Houlsby et al., arXiv:1902.00751: near the identity at first.
_INIT = Normal(0.01)


class Bottleneck(nn.Module):
  """y = f(x) + scale * (activation(z D + c) U + b).

  z is f(x) where `place` is 'sequential', and x where it is 'parallel'. U and
  the biases are zero at first, so that the function is the base's.

  Parameters: down [d, r], down_bias [r], up [r, d], up_bias [d], float32.

  Attributes:
    size: r.
    activation: of the hidden layer.
    place: 'sequential' or 'parallel'.
    scale: of the term.
    dropout: of the hidden layer, in training.
  """

  size: int = option(16, Range(1, 65_536))
  activation: str = option('relu', Choices(tuple(ACTIVATIONS)))
  place: str = option('sequential', Choices(('sequential', 'parallel')))
  scale: float = option(1.0, Range(-1_000, 1_000))
  dropout: float = option(0.0, DROPOUT, training_only=True)

  # Of experts, what `Mixture.down_arrays` lists.
  down_names: ClassVar[tuple[str, ...]] = ('down',)

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    return self._run(self, f, x, ctx)

  @nn.nowrap
  def mix(
    self, module: nn.Module, f: BaseLayer, x: Array, ctx: Context, mixing: Any
  ) -> Array:
    """f(x) + scale sum_e p_e (activation(z D_e + c_e) U_e + b_e).

    Combined parameters are one adapter of the weighted sums, as in SMEAR.

    Parameters: down [d, e, r], down_bias [e, r], up [e, r, d], up_bias [e, d];
    of a shared projection neither it nor its bias has e.
    """
    return self._run(module, f, x, ctx, mixing)

  @nn.nowrap
  def _run(
    self,
    module: nn.Module,
    f: BaseLayer,
    x: Array,
    ctx: Context,
    mixing: Any = None,
  ) -> Array:
    y = f(x)
    if x.ndim != 3 or y.ndim != 3:
      raise ValueError(
        f'{module.name or "bottleneck"} acts at whole sublayers (like */mlp) '
        'and at sites without heads; change its option `targets`'
      )
    z = y if self.place == 'sequential' else x.astype(y.dtype)
    d_in, d_out, r = z.shape[-1], y.shape[-1], self.size
    e = (mixing.experts,) if mixing else ()
    shared = mixing.share if mixing else ''
    e_down, e_up = (() if shared == name else e for name in ('down', 'up'))
    letter_down, letter_up = ('e' if axis else '' for axis in (e_down, e_up))
    kernel_down = peft_param(
      module, 'down', _INIT, (d_in, *e_down, r), f'd{letter_down}r'
    )
    bias_down = peft_param(
      module, 'down_bias', _ZERO, (*e_down, r), f'{letter_down}r'
    )
    kernel_up = peft_param(
      module, 'up', _ZERO, (*e_up, r, d_out), f'{letter_up}rd'
    )
    bias_up = peft_param(
      module, 'up_bias', _ZERO, (*e_up, d_out), f'{letter_up}d'
    )
    hidden = down(z, kernel_down) + bias_down.astype(z.dtype)
    weights = mixing.weights().astype(z.dtype) if mixing else None
    if mixing and e_down and mixing.combine == 'parameters':
      hidden = jnp.einsum('bter,bte->btr', hidden, weights)
    hidden = ACTIVATIONS[self.activation](hidden)
    hidden = nn.Dropout(self.dropout)(hidden, deterministic=not ctx.train)
    if mixing is None:
      term = up(hidden, kernel_up) + bias_up.astype(z.dtype)
      return y + self.scale * term
    if hidden.ndim == 3:
      hidden = hidden[..., None, :]
    hidden = hidden * weights[..., None]
    if e_up:
      bias = jnp.einsum('bte,ed->btd', weights, bias_up.astype(z.dtype))
    else:
      hidden = jnp.sum(hidden, axis=-2)
      total = jnp.sum(weights, axis=-1, keepdims=True)
      bias = total * bias_up.astype(z.dtype)
    return y + self.scale * (up(hidden, kernel_up) + bias)


_ROLES = ('attention', 'mlp')

METHOD = Method(
  module=Bottleneck,
  roles={'official': _ROLES, 'paper': _ROLES},
  additive=True,
  exact_identity=True,
  shareable=('down', 'up'),
  combine=('outputs', 'parameters'),
  size_option='size',
  scaled_leaves=(),
  why_not='its hidden layer is not linear',
)
