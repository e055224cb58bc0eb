# SPDX-License-Identifier: Apache-2.0
"""The modules that replace trained adapters in an adapter pool.

They compute the same function from arrays alone. Values that a trained module
derives from its path or from the base weights are computed once, on loading.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.moe import ROUTERS, RouterSpec
from moepeft.moe.task_names import task_names
from moepeft.nn.adapter_hook import AdapterMap, BaseLayer
from moepeft.nn.initializers import Constant, peft_param
from moepeft.peft import Method


class SwitchedAdapter(nn.Module):
  """y = adapter(f, x) if `on`, otherwise exactly f(x).

  It serves adapters that cannot equal the base for any parameters, such as a
  mixture of vectors whose weights do not sum exactly to one. f(x) is computed
  once.

  Parameters: on [], 0 or 1, in addition to the adapter's parameters.
  """

  adapter: nn.Module
  # Other adapters of the row are identities where this one is on.
  exclusive = True

  @property
  def router(self) -> nn.Module | None:
    return getattr(self.adapter, 'router', None)

  @property
  def two_pass(self) -> bool:
    return getattr(self.adapter, 'two_pass', False)

  @property
  def embedding_size(self) -> int:
    return getattr(self.adapter, 'embedding_size', 0)

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    nn.share_scope(self, self.adapter)
    on = peft_param(self, 'on', Constant(0), (), '')
    y = f(x)
    cached_base = dataclasses.replace(f, call=lambda z: y if z is x else f(z))
    return jnp.where(on > 0, self.adapter(cached_base, x, ctx), y)


def check_decodes(adapter: nn.Module, path: str) -> None:
  """Checks that the engine can run an adapter at a site.

  Raises:
    ValueError: its router reads the prompt outside of the layers, which have
      the caches.
  """
  if reads_prompt(adapter) and '/' not in path:
    raise ValueError(
      f'the router of {adapter.name} reads the whole prompt at {path!r}, and '
      'only layers have a cache of it; train it and score with it, or generate '
      "with targets='*/*'"
    )


def reads_prompt(adapter: nn.Module) -> bool:
  """Whether an adapter's router reads the whole prompt at each token."""
  entry = router_entry(adapter)
  return entry is not None and entry.pools_prompt


def request_tasks(adapter_map: AdapterMap) -> tuple[str, ...]:
  """The names of tasks, of which a request has to name one; () for none."""
  entries = tuple(
    (path, adapter)
    for path, adapter in adapter_map.entries
    if (entry := router_entry(adapter)) and entry.needs_tasks
  )
  return task_names(AdapterMap(entries))


def experts_per_layer(
  adapter_map: AdapterMap,
) -> dict[str, tuple[int, ...] | str]:
  """{site: the option `experts_per_layer`} of the mixtures that have it."""
  return {
    path: counts
    for path, adapter in adapter_map.entries
    if (counts := getattr(adapter, 'experts_per_layer', ()))
  }


def router_entry(adapter: nn.Module) -> RouterSpec | None:
  """The registry entry of an adapter's router; None without a router."""
  router = type(getattr(adapter, 'router', None))
  return next((r for r in ROUTERS.values() if r.module is router), None)


def served_module(method: Method, adapter: nn.Module, name: str) -> nn.Module:
  """Returns the module that replaces a trained adapter in a pool.

  Args:
    method: the registry entry of the adapter's method.
    name: the module's name in the pool's tree.
  """
  entry = router_entry(adapter)
  if entry is not None and entry.pooled_module:
    router = entry.pooled_module(adapter.router)
    adapter = adapter.clone(router=router, parent=None)
  if method.pooled_module:
    return method.pooled_module(adapter, name)
  if method.exact_identity:
    return adapter.clone(name=name, parent=None)
  # `share_scope` gives it the scope of the wrapper.
  inner = adapter.clone(name=None, parent=None)
  return SwitchedAdapter(inner, name=name, parent=None)
