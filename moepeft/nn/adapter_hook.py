# SPDX-License-Identifier: Apache-2.0
"""The seam: sites, the frozen call at a site, and the advice around it.

A model asks for advice at every site and knows nothing of methods. Advice
comes as a table from site paths to adapters (made by `moepeft.peft.build`);
an adapter's parameters live in the collection 'peft' below the site's path,
so the 'params' tree is the same with and without it.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.nn.initializers import LABELS


@dataclasses.dataclass(frozen=True)
class Advice:
  """Which adapters act where; hashable, opaque to Flax.

  Attributes:
    entries: (site path, unbound adapter module with its name set), in the
      order in which they nest: the first is the innermost.
  """

  entries: tuple[tuple[str, nn.Module], ...] = ()

  def at(self, site: str) -> tuple[nn.Module, ...]:
    return tuple(adapter for path, adapter in self.entries if path == site)


@dataclasses.dataclass(frozen=True)
class Frozen:
  """`f` of an adapter: what the base model would do at a site.

  Attributes:
    call: x -> y, bias included.
    eqn: the einsum of `x` and the kernel, letters as in the legend; None
      where the site has no weight.
    shape: the kernel's shape.
    inside, outside: the letters of what x and y have after [b, t], 'd' and
      'nh'; '' where that is no plain array of features (token ids, `Heads`).
    kernel: () -> the (dequantised) weight in the compute dtype.
    bias: the bias, or None.
    module: for a sublayer, the Flax module behind `call`, whose lifted
      transforms (`vmap`) an adapter may use.
    run: for a sublayer, (module, x) -> y, the unbound form of `call`.
    tied: for a head, the embedding whose table it is; else None.
  """

  call: Callable[[Array], Array]
  eqn: str | None = None
  shape: tuple[int, ...] = ()
  inside: str = ''
  outside: str = ''
  kernel: Callable[[], Array] | None = None
  bias: Array | None = None
  module: nn.Module | None = None
  run: Callable[[nn.Module, Array], Array] | None = None
  tied: nn.Module | None = None

  def __call__(self, x: Array) -> Array:
    return self.call(x)

  def vmap(self, size: int) -> Callable[[Array], Array]:
    """x -> [size, ...y]: experts that share this frozen sublayer.

    Inner sites get an axis of `size` in their 'peft' parameters, in front of
    their own axes; 'params' are shared.
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
        LABELS: 0,
        'routing': 0,
        'weights': 0,
      },
      split_rngs={
        'params': False,
        'peft': True,
        LABELS: True,
        'dropout': True,
        'router': True,
      },
      metadata_params={'peft': 'e'},
    )
    return lambda x: lifted(self.module, x)


def advise(
  parent: nn.Module, advice: Advice, site: str, f: Frozen, x, ctx: Context
):
  """Calls `f` at `x` with the site's adapters around it, innermost first."""
  for adapter in advice.at(site):
    # Deep, because a shared router would belong to the first site only.
    f = _wrap(adapter.clone(parent=parent, _deep_clone=True), f, ctx)
  return f(x)


def _wrap(adapter: nn.Module, f: Frozen, ctx: Context) -> Frozen:
  return dataclasses.replace(
    f, call=lambda x: adapter(f, x, ctx), module=None, run=None
  )


class Tap(nn.Module):
  """A site without weights: advice on a value that flows by.

  Attributes:
    letters: of the value's features, after [b, t].
  """

  site: str
  advice: Advice
  letters: str

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Array:
    f = Frozen(
      lambda x: x,
      shape=x.shape[2:],
      inside=self.letters,
      outside=self.letters,
    )
    return advise(self, self.advice, self.site, f, x, ctx)


class Around(nn.Module):
  """The site of a whole sublayer; a sibling of the sublayer's module.

  Its adapters live beside the sublayer, not below it, so that a lifted
  `vmap` over the sublayer does not touch their own parameters.
  """

  site: str
  advice: Advice

  @nn.compact
  def __call__(self, module: nn.Module, run, x, ctx: Context):
    f = Frozen(
      lambda x: run(module, x),
      inside='d',
      outside='d',
      module=module,
      run=run,
    )
    return advise(self, self.advice, self.site, f, x, ctx)


def contraction(eqn: str) -> tuple[str, str, str, str]:
  """Splits 'btd,dnh->btnh' into (batch, in, out) letters and the order.

  Returns:
    ('bt', 'd', 'nh', 'btnh'): letters that pass through, letters that are
    summed, letters that the kernel brings, and the output as written.
  """
  operands, output = eqn.split('->')
  x, kernel = operands.split(',')
  inner = ''.join(c for c in kernel if c in x and c not in output)
  outer = ''.join(c for c in kernel if c not in x)
  batch = ''.join(c for c in x if c not in inner)
  return batch, inner, outer, output


def contract(eqn: str, x: Array, kernel: Array, accumulate=None) -> Array:
  """jnp.einsum(eqn, x, kernel) with all that is summed as one axis.

  The same sum in one matrix product: faster on CPU than a product over two
  axes, and in the order of addition of layers that flatten heads first.
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
  """The size of each letter of the kernel: {'d': 512, 'n': 6, 'h': 64}."""
  return dict(zip(kernel_letters(eqn), shape, strict=True))


def flatten_features(x: Array, keep: int = 2) -> Array:
  """[b, t, ...] -> [b, t, d]: every axis after the first `keep` in one."""
  return jnp.reshape(x, (*x.shape[:keep], -1))
