# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv:2106.09685): y = f(x) + alpha / r (x A) B."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moepeft.core.ranges import Choices, Range, option
from moepeft.core.types import Array, Context
from moepeft.moe.dispatch import Dispatch
from moepeft.nn.adapter_hook import BaseLayer, flatten_features
from moepeft.nn.initializers import (
  Constant,
  Initializer,
  Normal,
  SparseNormal,
  kaiming_uniform,
  peft_param,
)
from moepeft.nn.numerics import to_f32
from moepeft.peft.initial_factors import FROM_BASE, FROM_CHUNKS, of_kernel
from moepeft.peft.low_rank import (
  ALPHA,
  DROPOUT,
  RANK,
  down,
  product,
  shapes,
  split_term,
  up,
)
from moepeft.peft.method import Exclusion, Method

INIT_A = Normal(0.02)
INIT_B = Constant(0)
A_INITS = ('normal', 'kaiming', 'sparse')
EXCLUSIONS = (
  Exclusion(
    ('ranks',),
    ('shared_experts', 'combine', 'dispatch=sparse', 'init_weights'),
    'experts of different ranks are mixed by their outputs, and all are '
    'computed and start at zero; drop {second} or ranks',
  ),
  Exclusion(
    ('a_groups', 'b_groups'),
    ('experts_per_layer', 'from_adapters', 'init_weights'),
    '{first} gives layers one array, and {second} gives each its own; drop one '
    'of them',
  ),
  Exclusion(
    (f'init_weights={FROM_CHUNKS}',),
    (
      'share',
      'experts_per_layer',
      'from_adapters',
      'shared_experts',
      'identity_experts',
      'combine',
    ),
    f"init_weights='{FROM_CHUNKS}' is of experts with factors of their own "
    'that the router alone weights, as many in each layer; drop {second}',
  ),
)
# FlyLoRA's k / r, 8 of 32 (arXiv:2510.08396).
_DENSITY = 0.25


def pays(rank: int, tokens: int, e: int, k: int) -> bool:
  """Whether sorting tokens by expert is faster than computing all experts.

  Measured; docs/methods.md has the table.
  """
  return tokens >= 256 and e * rank >= 256 * k


class Lora(nn.Module):
  """A low-rank term beside a projection; the base's function at first.

  Parameters: a [*in, r] ~ N(0, 0.02^2), b [r, *out] zeros (the released
  code's initialisers), float32, computed in x's dtype.

  Attributes:
    rank: r.
    alpha: the term is scaled by alpha / r (16 in the released code).
    rslora: scale by alpha / sqrt(r) instead (arXiv:2312.03732).
    dropout: of the term's input, in training.
    a_init: 'normal'; 'kaiming': U(-1/sqrt(in), 1/sqrt(in)), as in peft;
      'sparse': a quarter of each column from N(0, 1 / columns^2), as in FlyLoRA
      (arXiv:2510.08396).
    train_a: whether A is trained; else it stays as it was drawn, as in LoRA-FA
      (arXiv:2308.03303).
    init_weights: 'zero': B is zero, and A as `a_init` has it. Others take A and
      B from the kernel W, and subtract the term of a frozen copy of both, as
      the base may not change: y = f(x) + scale (x A B - x A0 B0). 'pissa': the
      r largest singular values with their vectors (arXiv:2404.02948); 'olora':
      the first r columns of Q and rows of R, where Q R is W as torch stores it
      (arXiv:2406.01775); 'svd_chunks': of experts alone, see `mix`.
    a_groups, b_groups: the number of groups of consecutive layers of a stack
      that have one A, or one B; 0 where each layer has its own.
  """

  rank: int = option(4, RANK)
  alpha: float = option(16.0, ALPHA)
  rslora: bool = False
  dropout: float = option(0.0, DROPOUT, training_only=True)
  a_init: str = option('normal', Choices(A_INITS), training_only=True)
  train_a: bool = option(True, None, training_only=True)
  init_weights: str = option('zero', Choices(('zero', *FROM_BASE, FROM_CHUNKS)))
  a_groups: int = option(0, Range(0, 65_536))
  b_groups: int = option(0, Range(0, 65_536))

  @property
  def takes_splits(self) -> bool:
    """Whether parts of its parameters can be weighted; see `split_term`."""
    return type(self) is Lora and self.init_weights == 'zero'

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    """Regular expressions of arrays that stay as they were drawn."""
    copies = () if self.init_weights == 'zero' else ('initial_[ab]$',)
    return copies if self.train_a else ('a$', *copies)

  # Of experts, what `Mixture.down_arrays` lists.
  down_names: ClassVar[tuple[str, ...]] = ('a',)

  @property
  def tied_arrays(self) -> dict[str, int]:
    """{regular expression: groups} of arrays that layers have in common."""
    groups = {'a$': self.a_groups, 'b$': self.b_groups}
    return {leaf: count for leaf, count in groups.items() if count}

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
      return self._of_table(f, x)
    y = f(x)
    return y + self.term(self, f, x, y.dtype, ctx)

  @nn.nowrap
  def mix(
    self, module: nn.Module, f: BaseLayer, x: Array, ctx: Context, mixing: Any
  ) -> Array:
    """f(x) + scale sum_e p_e (x A_e) B_e.

    The weights act in rank space: p weights x A, and (e, r) is contracted with
    B in one product. It equals mixing the experts' outputs, as the released
    code does, and never builds [b, t, e, out]. Parameters are combined there
    too: (sum_e p_e x A_e) (sum_e p_e B_e) without a matrix of each token.

    With init_weights='svd_chunks' expert i starts from the r largest singular
    values of the i-th of e equal parts of them, over 10, and the mean of the
    experts' initial terms is subtracted: the base's function at first where the
    weights are even, as GOAT's are on average.

    Parameters: a [*in, e, r], b [e, r, *out]; a shared one has no e. Where
    `init_weights` takes them from the base, initial_a and initial_b like them.
    """
    y = f(x)
    return y + self.term(module, f, x, y.dtype, ctx, mixing)

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
    """The low-rank term in `dtype`, of one adapter or of weighted experts.

    Args:
      module: owns the parameters.
      mixing: a `Mixing` with 'a' or 'b' in `share` where the experts have it in
        common; None for one adapter.
    """
    a, b, e_a, e_b = self.factors(module, f, mixing)
    drop = nn.Dropout(self.dropout)
    low = drop(x, deterministic=not ctx.train).astype(dtype)
    if mixing and mixing.splits > 1:
      weights = mixing.weights().astype(dtype)
      return split_term(low, a, b, weights) * self.scale
    slots = (
      mixing
      and not mixing.ranks
      and mixing.slots(functools.partial(pays, self.rank))
    )
    if slots:
      term = self._sparse_term(slots, low, a, b)
    else:
      term = self._dense_term(low, a, b, bool(e_a), bool(e_b), mixing)
    if self.init_weights == 'zero':
      return term
    axes = 'er' if mixing else 'r'
    a0 = peft_param(
      module, 'initial_a', lambda *_: a, a.shape, f'{f.input_axes}{axes}'
    )
    b0 = peft_param(
      module, 'initial_b', lambda *_: b, b.shape, f'{axes}{f.output_axes}'
    )
    scale = self.scale / (mixing.experts if mixing else 1)
    return term - up(down(x.astype(dtype), a0) * scale, b0)

  @nn.nowrap
  def _dense_term(
    self, x: Array, a: Array, b: Array, many_a: bool, many_b: bool, mixing: Any
  ) -> Array:
    """`term` of one adapter, or of all experts.

    Args:
      many_a, many_b: whether A and B have an axis of experts.
    """
    z = down(x, a)
    if mixing is None:
      return up(z * self.scale, b)
    weights = mixing.weights(flatten_features(z))
    if not many_a:
      z = z[..., None, :]
    elif many_b and mixing.combine == 'parameters':
      z = jnp.einsum('bter,bte->btr', z, weights.astype(x.dtype))[..., None, :]
    weights = (
      weights.swapaxes(-1, -2) if mixing.by_column else weights[..., None]
    )
    scale = self.column_scales(mixing.ranks) if mixing.ranks else self.scale
    z = z * (weights * scale).astype(x.dtype)
    if not many_b:
      z = jnp.sum(z, axis=-2)
    return up(z, b)

  @nn.nowrap
  def _sparse_term(self, slots: Dispatch, x: Array, a: Array, b: Array):
    """`term` of the experts that a sparse router chose."""
    e, out = b.shape[0], b.shape[2:]
    flat = x.reshape(len(slots.slot), -1)
    a = a.astype(x.dtype).reshape(-1, e, self.rank)
    b = b.astype(x.dtype).reshape(e, self.rank, -1)
    z = slots.matmul(slots.to_slots(flat), jnp.moveaxis(a, 1, 0))
    z = z * (slots.weights * self.scale)[:, None].astype(x.dtype)
    y = slots.from_slots(slots.matmul(z, b))
    return y.reshape(*x.shape[:2], *out)

  @nn.nowrap
  def factors(
    self, module: nn.Module, f: BaseLayer, mixing: Any
  ) -> tuple[Array, Array, tuple[int, ...], tuple[int, ...]]:
    """(A, B, the experts' axis of A, that of B); a shared one has ()."""
    inside, outside = shapes(f, module.name or 'lora')
    e = (mixing.experts,) if mixing else ()
    e_a, e_b = (() if mixing and name in mixing.share else e for name in 'ab')
    shape_a = (*inside, *e_a, self.rank)
    shape_b = (*e_b, self.rank, *outside)
    axes_a, axes_b = ('er' if axis else 'r' for axis in (e_a, e_b))
    splits = mixing.splits if mixing else 1
    init_a, init_b = self.init_a(inside, e_a, splits), INIT_B
    if self.init_weights != 'zero':
      # Once for A and B.
      experts = mixing.experts if mixing else 1
      decompose = functools.cache(
        lambda: of_kernel(f, self.init_weights, self.rank, experts, self.scale)
      )
      init_a, init_b = (
        lambda key, shape, dtype, i=i: decompose()[i].reshape(shape)
        for i in (0, 1)
      )
    a = peft_param(module, 'a', init_a, shape_a, f'{f.input_axes}{axes_a}')
    b = peft_param(module, 'b', init_b, shape_b, f'{axes_b}{f.output_axes}')
    return a, b, e_a, e_b

  @nn.nowrap
  def init_a(
    self,
    inside: tuple[int, ...],
    experts: tuple[int, ...] = (),
    splits: int = 1,
  ) -> Initializer:
    """The initializer of A [*in, (e,) r]; of each of equal parts by itself."""
    if self.a_init == 'normal':
      return INIT_A
    if self.a_init == 'kaiming':
      return kaiming_uniform(-(-math.prod(inside) // splits))
    columns = math.prod(experts) * self.rank
    return SparseNormal(1 / columns, _DENSITY, len(inside), len(experts) + 1)

  def _of_table(self, f: BaseLayer, ids: Array) -> Array:
    """At an embedding: y = table[ids] + alpha / r A[ids] B, a [v, r]."""
    if self.init_weights != 'zero':
      raise ValueError(
        f'init_weights={self.init_weights!r} needs sites with a projection '
        '(like */q or */wo); change the option `targets`'
      )
    vocab, width = f.shape
    a = peft_param(self, 'a', self.init_a((vocab,)), (vocab, self.rank), 'vr')
    b = peft_param(self, 'b', INIT_B, (self.rank, width), 'rd')
    y = f(ids)
    rows = jnp.take(a, ids, axis=0).astype(y.dtype)
    return y + up(rows * self.scale, b)

  @property
  def scale(self) -> float:
    return self._scale(self.rank)

  def _scale(self, rank: int) -> float:
    return self.alpha / (rank**0.5 if self.rslora else rank)

  @nn.nowrap
  def column_scales(self, ranks: Sequence[int]) -> np.ndarray:
    """[e, r]: each expert's scale, zero in columns beyond its rank."""
    return np.array(
      [
        [self._scale(rank) * (column < rank) for column in range(self.rank)]
        for rank in ranks
      ],
      np.float32,
    )


def merge(variables, kernel: Array, *, adapter: Lora, eqn: str) -> Array:
  """The kernel with the term added: W + scale A B, in float32.

  With `init_weights` from the base it is W + scale (A B - A0 B0).
  """
  term = product(variables['a'], variables['b'], eqn)
  if adapter.init_weights != 'zero':
    term -= product(variables['initial_a'], variables['initial_b'], eqn)
  return to_f32(kernel) + adapter.scale * term


def check(options: Mapping[str, Any]) -> None:
  """Raises a ValueError for an `init_weights` of a mixture in one adapter, or
  one of an adapter in a mixture.

  Args:
    options: {option: value} of one adapter, or of a mixture of them.
  """
  init = options['init_weights']
  if 'experts' not in options and init == FROM_CHUNKS:
    raise ValueError(
      f'init_weights={init!r} gives each expert of a mixture a part; for one '
      "adapter write init_weights='pissa'"
    )
  if 'experts' in options and init in FROM_BASE:
    raise ValueError(
      f'init_weights={init!r} would start all experts as the same one; '
      f'init_weights={FROM_CHUNKS!r} gives each a part of the singular values'
    )


_PROJECTIONS = ('query', 'key', 'value', 'output', 'gate', 'down')

METHOD = Method(
  module=Lora,
  # The released code leaves wi_1 alone.
  roles={'official': _PROJECTIONS, 'paper': (*_PROJECTIONS, 'up')},
  additive=True,
  shareable=('a', 'b'),
  combine=('outputs', 'parameters'),
  dispatches=True,
  columns=True,
  merge=merge,
  exclusions=EXCLUSIONS,
  check=check,
  size_option='rank',
  scaled_leaves=('b', 'initial_b'),
  exact_identity=True,
)
