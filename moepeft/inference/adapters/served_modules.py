# SPDX-License-Identifier: Apache-2.0
"""Modules that stand in a bank for those that were trained.

They compute the same, from arrays alone: what a trained module takes from its
path or works out anew from the base's weights is worked out once, in loading.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.types import Array, Context
from moepeft.moe import ROUTERS, RouterSpec
from moepeft.moe.task_names import router_tasks
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.nn.initializers import Constant, peft_param
from moepeft.peft import Method


class SwitchedAdapter(nn.Module):
  """y = adapter(f, x) where `on`, else f(x) bit for bit.

  For adapters that no values make exactly the base: a mixture of vectors
  whose weights sum to one only nearly, or to less. f(x) is computed once.

  Parameters: on [], 0 or 1, beside the adapter's own, under its name.
  """

  adapter: nn.Module

  @nn.compact
  def __call__(self, f: BaseLayer, x: Array, ctx: Context) -> Array:
    nn.share_scope(self, self.adapter)
    on = peft_param(self, 'on', Constant(0), (), '')
    y = f(x)
    once = dataclasses.replace(f, call=lambda z: y if z is x else f(z))
    return jnp.where(on > 0, self.adapter(once, x, ctx), y)


def check_decodes(adapter: nn.Module) -> None:
  """Raises ValueError for a router that the engine's caches cannot serve."""
  entry = router_entry(adapter)
  if entry is not None and entry.pools_prompt:
    raise ValueError(
      f'the router of {adapter.name} reads the whole prompt at each token, '
      'which the caches of the engine do not hold; train it and score with '
      'it, or generate with another router'
    )
  if router_tasks(adapter):
    raise ValueError(
      f'the router of {adapter.name} reads the task of each example, and a '
      'request names none; train it and score with it, or generate with '
      'another router'
    )


def router_entry(adapter: nn.Module) -> RouterSpec | None:
  """The entry of an adapter's router; None without one."""
  router = type(getattr(adapter, 'router', None))
  return next((r for r in ROUTERS.values() if r.module is router), None)


def served_module(method: Method, adapter: nn.Module, name: str) -> nn.Module:
  """The module that stands for a trained adapter in a pool.

  Args:
    method: the adapter's entry.
    name: its name in the pool's tree.
  """
  entry = router_entry(adapter)
  if entry is not None and entry.pooled_module:
    router = entry.pooled_module(adapter.router)
    adapter = adapter.clone(router=router, parent=None)
  if method.pooled_module:
    return method.pooled_module(adapter, name)
  if method.exact_identity:
    return adapter.clone(name=name, parent=None)
  # Its scope is the wrapper's.
  inner = adapter.clone(name=None, parent=None)
  return SwitchedAdapter(inner, name=name, parent=None)
