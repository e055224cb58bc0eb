# SPDX-License-Identifier: Apache-2.0
"""The adapter hook: a base model calls the adapters that wrap its layers.

Every layer or activation that an adapter can change is a site with a path like
'encoder/self/k'. The model looks the path up in an `AdapterMap` (built by
`moepeft.peft.build`) and does not depend on any method. An adapter's parameters
are in the collection 'peft' below the site's path, so the 'params' tree is the
same with and without adapters.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.initializers import METADATA


@dataclasses.dataclass(frozen=True)
class AdapterMap:
  """The adapters of each site; hashable, opaque to Flax.

  Attributes:
    entries: (site path, unbound adapter module with its name set), from the
      innermost to the outermost.
  """

  entries: tuple[tuple[str, nn.Module], ...] = ()

  @property
  def two_pass(self) -> bool:
    """Whether an adapter reads a first pass of the base alone."""
    return any(getattr(a, 'two_pass', False) for _, a in self.entries)

  def at(self, site: str) -> tuple[nn.Module, ...]:
    return tuple(adapter for path, adapter in self.entries if path == site)


@dataclasses.dataclass(frozen=True)
class BaseLayer:
  """The layer that an adapter wraps: `layer(x)` is the base model's output.

  Attributes:
    call: x -> y, bias included.
    eqn: the einsum of `x` and the kernel, axes as in AXIS_NAMES; None if the
      site has no weight.
    shape: the kernel's shape.
    input_axes, output_axes: the axes of x and y after [b, t], 'd' and 'nh';
      '' for token ids and `Heads`.
    kernel: () -> the (dequantized) weight in the compute dtype; of a norm, the
      scale as it is stored.
    bias: the bias, or None.
    normalize: for a norm, x -> y without scale and bias.
    module: for a sublayer, the Flax module behind `call`, whose lifted
      transforms (`vmap`) an adapter may use.
    run: for a sublayer, (module, x) -> y, the unbound form of `call`.
    tied_embedding: for a tied head, the embedding's module; else None.
  """

  call: Callable[[Array], Array]
  eqn: str | None = None
  shape: tuple[int, ...] = ()
  input_axes: str = ''
  output_axes: str = ''
  kernel: Callable[[], Array] | None = None
  bias: Array | None = None
  normalize: Callable[[Array], Array] | None = None
  module: nn.Module | None = None
  run: Callable[[nn.Module, Array], Array] | None = None
  tied_embedding: nn.Module | None = None

  def __call__(self, x: Array) -> Array:
    return self.call(x)

  def vmap(self, size: int) -> Callable[[Array], Array]:
    """x -> [size, ...y]: `size` experts that share this frozen sublayer.

    The 'peft' parameters of inner sites get a first axis of `size`; 'params'
    are shared.
    """
    if self.module is None:
      raise ValueError(
        'vmap needs a whole sublayer (a site like encoder/mlp) and no other '
        'adapter inside it at the same site; put this adapter first'
      )
    lifted = nn.vmap(
      self.run,
      in_axes=None,
      axis_size=size,
      variable_axes={
        'params': None,
        'peft': 0,
        METADATA: 0,
        'routing': 0,
        'weights': 0,
      },
      split_rngs={
        'params': False,
        'peft': True,
        METADATA: True,
        'dropout': True,
        'router': True,
      },
      metadata_params={'peft': 'experts'},
    )
    return lambda x: lifted(self.module, x)


def apply_adapters(
  parent: nn.Module,
  adapter_map: AdapterMap,
  site: str,
  f: BaseLayer,
  x,
  ctx: Context,
):
  """Calls `f` at `x` with the site's adapters around it, innermost first."""
  for adapter in () if ctx.without_adapters else adapter_map.at(site):
    # A deep clone, because a shared router would belong to the first site only.
    f = wrap(adapter.clone(parent=parent, _deep_clone=True), f, ctx)
  return f(x)


def wrap(adapter: Callable, f: BaseLayer, ctx: Context) -> BaseLayer:
  """The layer with an adapter around it, (layer, x, ctx) -> y."""
  f = dataclasses.replace(f, call=functools.partial(_call, adapter, f, ctx))
  # In a pool at most one adapter of a row is on, and may replace the sublayer.
  exclusive = getattr(adapter, 'exclusive', False)
  return f if exclusive else dataclasses.replace(f, module=None, run=None)


def _call(adapter: Callable, f: BaseLayer, ctx: Context, x: Array) -> Array:
  return adapter(f, x, ctx)


class ActivationHook(nn.Module):
  """The site of an activation, which has no weights.

  Attributes:
    axes: the axes of the activation's features, after [b, t].
  """

  site: str
  adapter_map: AdapterMap
  axes: str

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    f = BaseLayer(
      lambda x: x,
      shape=x.shape[2:],
      input_axes=self.axes,
      output_axes=self.axes,
    )
    return apply_adapters(self, self.adapter_map, self.site, f, x, ctx)


class SublayerHook(nn.Module):
  """The site of a whole sublayer; a sibling of the sublayer's module.

  Its adapters are beside the sublayer, not below it, so that a lifted `vmap`
  over the sublayer does not add an axis to their parameters.
  """

  site: str
  adapter_map: AdapterMap

  @nn.compact
  def __call__(self, module: nn.Module, run, x, ctx: Context):
    f = BaseLayer(
      lambda x: run(module, x),
      input_axes='d',
      output_axes='d',
      module=module,
      run=run,
    )
    return apply_adapters(self, self.adapter_map, self.site, f, x, ctx)


def contraction(eqn: str) -> tuple[str, str, str, str]:
  """Splits 'btd,dnh->btnh' into its (batch, input, output) axes and its result.

  Returns:
    ('bt', 'd', 'nh', 'btnh'): axes of x in the result, axes that are summed,
    axes of the kernel in the result, and the result's axes in order.
  """
  operands, output = eqn.split('->')
  x, kernel = operands.split(',')
  inner = ''.join(c for c in kernel if c in x and c not in output)
  outer = ''.join(c for c in kernel if c not in x)
  batch = ''.join(c for c in x if c not in inner)
  return batch, inner, outer, output


def contract(eqn: str, x: Array, kernel: Array, accumulate=None) -> Array:
  """jnp.einsum(eqn, x, kernel) with the summed axes flattened to one.

  One matrix product is faster on CPU than a product over two axes, and adds in
  the same order as layers that flatten heads first.
  """
  batch, inner, outer, output = contraction(eqn)
  left, right = eqn.split('->')[0].split(',')
  if (left, right, output) == (batch + inner, inner + outer, batch + outer):
    x = x.reshape(*x.shape[: len(batch)], -1)
    kernel = kernel.reshape(-1, *kernel.shape[len(inner) :])
    i = inner[0]
    eqn = f'{batch}{i},{i}{outer}->{output}'
  return jnp.einsum(eqn, x, kernel, preferred_element_type=accumulate)


def kernel_letters(eqn: str) -> str:
  """'btd,dnh->btnh' -> 'dnh'."""
  return eqn.split('->')[0].split(',')[1]


def sizes(eqn: str, shape: tuple[int, ...]) -> dict[str, int]:
  """The size of each axis of the kernel: {'d': 512, 'n': 6, 'h': 64}."""
  return dict(zip(kernel_letters(eqn), shape, strict=True))


def flatten_features(x: Array, keep: int = 2) -> Array:
  """[b, t, ...] -> [b, t, d]: flattens all axes after the first `keep`."""
  return jnp.reshape(x, (*x.shape[:keep], -1))
