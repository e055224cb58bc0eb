# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA (Zhang et al., arXiv:2303.10512): LoRA whose ranks are allocated.

A site's term has the form of a singular value decomposition, A diag(E) B. In
training, the values E of the least important triplets (a column of A, a value
and a row of B) of all sites become zero, until the mean rank is `target_rank`.

The importance of a triplet depends on the gradients of its parameters, so it is
state of the optimizer: `allocate_ranks`. An export is a `lora` of A and
diag(E) B.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from moepeft.config.method_string import Spec
from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Tree
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import Constant, Normal, peft_param
from moepeft.nn.numerics import to_f32
from moepeft.peft import low_rank
from moepeft.peft.method import Method
from moepeft.peft.methods import lora

STEPS = Range(0, 2**31 - 1)
DECAY = Range(0, 1, below=True)
_LEAVES = ('a', 'e', 'b')


class AdaLora(nn.Module):
  """y = f(x) + alpha / r ((x A) * e) B; the base's function at first.

  Parameters: a [*in, r] and b [r, *out] ~ N(0, 0.02^2), e [r] zeros, float32.

  Attributes:
    rank: r, the rank of every site at first.
    target_rank: the mean rank of the sites in the end.
    alpha: the term is scaled by alpha / r, whatever rank is left.
    dropout: of the term's input, in training.
    tinit: the steps before ranks are lowered.
    tfinal: the steps after the last allocation, in which ranks stay.
    delta_t: the steps between allocations.
    beta1, beta2: decays of the moving averages of sensitivity and uncertainty.
    orthogonality: the weight of the mean over all A and B of
      |A^T A - I| and |B B^T - I| (Frobenius), as in the released code; the
      paper has the sum of the squares.
  """

  rank: int = option(12, low_rank.RANK)
  target_rank: int = option(8, low_rank.RANK, training_only=True)
  alpha: float = option(16.0, low_rank.ALPHA)
  dropout: float = option(0.0, low_rank.DROPOUT, training_only=True)
  tinit: int = option(0, STEPS, training_only=True)
  tfinal: int = option(0, STEPS, training_only=True)
  delta_t: int = option(1, Range(1, 2**31 - 1), training_only=True)
  beta1: float = option(0.85, DECAY, training_only=True)
  beta2: float = option(0.85, DECAY, training_only=True)
  orthogonality: float = option(0.5, Range(0, 1_000), training_only=True)

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    inside, outside = low_rank.shapes(f, 'adalora')
    shape_a, shape_b = (*inside, self.rank), (self.rank, *outside)
    a = peft_param(self, 'a', Normal(0.02), shape_a, f'{f.input_axes}r')
    e = peft_param(self, 'e', Constant(0), (self.rank,), 'r')
    b = peft_param(self, 'b', Normal(0.02), shape_b, f'r{f.output_axes}')
    y = f(x)
    drop = nn.Dropout(self.dropout)
    low = drop(x, deterministic=not ctx.train).astype(y.dtype)
    z = low_rank.down(low, a) * (e * self.scale).astype(y.dtype)
    return y + low_rank.up(z, b)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  @nn.nowrap
  def wrap_optimizer(
    self, optimizer: optax.GradientTransformation, steps: int
  ) -> optax.GradientTransformation:
    return allocate_ranks(optimizer, self, steps)


class RankState(NamedTuple):
  """The state of `allocate_ranks`.

  Attributes:
    count: int32, the steps that were done.
    sensitivity, uncertainty: {path: moving average} of the adapter's arrays.
    optimizer: the state of the optimizer inside.
  """

  count: Array
  sensitivity: dict[str, Array]
  uncertainty: dict[str, Array]
  optimizer: optax.OptState


def allocate_ranks(
  optimizer: optax.GradientTransformation, adapter: AdaLora, steps: int
) -> optax.GradientTransformation:
  """The optimizer with AdaLoRA's loss and its allocation of ranks.

  A parameter's sensitivity is |w g|, with w after the step and g before it, as
  in the released code; the paper has both before. Here g is the gradient before
  it is clipped.

  Args:
    adapter: the entries of its name in the tree are allocated together.
    steps: of the run.

  Raises:
    ValueError: the run has no step in which ranks are lowered.
  """
  last = steps - adapter.tfinal
  if adapter.tinit >= last:
    raise ValueError(
      f'{adapter.name}: tinit={adapter.tinit} and tfinal={adapter.tfinal} '
      f'leave none of the {steps} steps of the run to lower ranks in; lower '
      'them, or raise config.steps'
    )

  def init(params: Tree) -> RankState:
    zeros = jax.tree.map(jnp.zeros_like, _arrays_of(adapter, params))
    # The two are donated apart.
    copies = jax.tree.map(jnp.zeros_like, zeros)
    return RankState(jnp.int32(0), zeros, copies, optimizer.init(params))

  def update(gradient: Tree, state: RankState, params: Tree):
    before = _arrays_of(adapter, params)
    slopes = jax.grad(
      lambda arrays: adapter.orthogonality * orthogonality(_sites(arrays))
    )(before)
    slopes = jax.tree.map(jnp.add, _arrays_of(adapter, gradient), slopes)
    updates, inner = optimizer.update(
      _replace(gradient, slopes), state.optimizer, params
    )
    changes = _arrays_of(adapter, updates)
    is_open = state.count < last

    def average(decay, mean, value):
      return jnp.where(is_open, decay * mean + (1 - decay) * value, mean)

    sensitivity, uncertainty, scores = {}, {}, {}
    for path, slope in slopes.items():
      current = jnp.abs((before[path] + changes[path]) * slope)
      mean = average(adapter.beta1, state.sensitivity[path], current)
      spread = average(
        adapter.beta2, state.uncertainty[path], jnp.abs(current - mean)
      )
      sensitivity[path], uncertainty[path] = mean, spread
      scores[path] = mean * spread
    importance = {
      site: _importance(*arrays) for site, arrays in _sites(scores).items()
    }
    ranked = jnp.sort(jnp.concatenate([*map(jnp.ravel, importance.values())]))
    removed = jnp.asarray(removed_triplets(adapter, steps, len(ranked)))
    count = removed[state.count]
    threshold = jnp.where(count > 0, ranked[count - 1], -jnp.inf)
    for site, values in importance.items():
      path = f'{site}e'
      value, change = before[path], changes[path]
      is_removed = values.reshape(value.shape) <= threshold
      # After the last allocation a value that was removed stays so.
      is_removed |= (state.count > last) & (value == 0)
      changes[path] = jnp.where(is_removed, -value, change)
    updates = _replace(updates, changes)
    return updates, RankState(state.count + 1, sensitivity, uncertainty, inner)

  return optax.GradientTransformation(init, update)


def removed_triplets(adapter: AdaLora, steps: int, total: int) -> np.ndarray:
  """int32 [steps]: the number of triplets without a value after each step, by
  the cubic schedule of the paper's equation 12; 0 where none is allocated.

  Args:
    total: the number of triplets of all sites, at first.
  """
  first, last = adapter.tinit, steps - adapter.tfinal
  target = total // adapter.rank * adapter.target_rank
  removed = np.zeros(steps, np.int32)
  for step in range(first + 1, min(last + 1, steps)):
    if step % adapter.delta_t == 0 or step == last:
      left = 1 - (step - first) / (last - first)
      removed[step] = total - int((total - target) * left**3 + target)
  return removed


def orthogonality(sites: Mapping[str, tuple[Array, Array, Array]]) -> Array:
  """The mean over sites and layers of |A^T A - I| and |B B^T - I|.

  Args:
    sites: {site: (a, e, b)}, e [(l,) r].
  """
  norms = []
  for arrays in sites.values():
    a, _, b = _factors(*arrays)
    for columns in (a, b.swapaxes(1, 2)):
      gram = jnp.einsum('lir,lis->lrs', columns, columns)
      excess = gram - jnp.eye(gram.shape[-1])
      norms.append(jax.vmap(lambda m: optax.safe_norm(m, 0.0))(excess))
  return jnp.mean(jnp.concatenate(norms))


def _importance(a: Array, e: Array, b: Array) -> Array:
  """[l, r]: the score of e plus the mean scores of A's column and B's row."""
  a, e, b = _factors(a, e, b)
  return e + jnp.mean(a, axis=1) + jnp.mean(b, axis=2)


def _factors(a: Array, e: Array, b: Array) -> tuple[Array, Array, Array]:
  """a [l, in, r], e [l, r], b [l, r, out]; l is 1 outside of a stack."""
  r = e.shape[-1]
  e = e.reshape(-1, r)
  return a.reshape(len(e), -1, r), e, b.reshape(len(e), r, -1)


def _arrays_of(adapter: AdaLora, tree: Tree) -> dict[str, Array]:
  """{path: array} of the adapter's arrays in a 'peft' tree."""
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return {p: a for p, a in flat.items() if f'/{adapter.name}/' in p}


def _sites(arrays: Mapping[str, Array]) -> dict[str, tuple]:
  """{path up to the leaf: (a, e, b)}."""
  sites = dict.fromkeys(path[:-1] for path in arrays)
  return {s: tuple(arrays[f'{s}{leaf}'] for leaf in _LEAVES) for s in sites}


def _replace(tree: Tree, arrays: Mapping[str, Array]) -> Tree:
  flat = flax.traverse_util.flatten_dict(tree, sep='/')
  return flax.traverse_util.unflatten_dict(flat | dict(arrays), sep='/')


def merge(variables, kernel: Array, *, adapter: AdaLora, eqn: str) -> Array:
  """W + alpha / r A diag(e) B, in float32."""
  a = variables['a'] * variables['e']
  return to_f32(kernel) + adapter.scale * low_rank.product(
    a, variables['b'], eqn
  )


def check(options: Mapping[str, Any]) -> None:
  """Raises a ValueError where no rank would be lowered."""
  if options['target_rank'] >= options['rank']:
    raise ValueError(
      f'target_rank={options["target_rank"]} is the mean rank in the end, '
      f'below the initial rank={options["rank"]}; lower it, or take lora'
    )


def fold(spec: Spec, arrays: dict[str, Any]) -> tuple[Spec, dict[str, Any]]:
  """The LoRA of A and diag(e) B; its rank is that of the start."""
  names = ('rank', 'alpha', 'targets')
  defaults = {'rank': AdaLora.rank, 'alpha': AdaLora.alpha}
  options = defaults | {k: v for k, v in spec.options if k in names}
  e, b = arrays['e'], arrays['b']
  b = b * e.reshape(*e.shape, *(1,) * (b.ndim - e.ndim))
  return Spec('lora', tuple(options.items())), {'a': arrays['a'], 'b': b}


METHOD = Method(
  module=AdaLora,
  roles=lora.METHOD.roles,
  merge=merge,
  check=check,
  fold=fold,
  not_pooled=(
    'it is served as the LoRA that it computes; name that, as in lora(rank=12)'
  ),
)
