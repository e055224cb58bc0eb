# SPDX-License-Identifier: Apache-2.0
"""Folds adapters into the base where their change does not depend on x."""

import dataclasses
import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp

from moepeft.config.method_string import parse_method
from moepeft.core.types import Tree
from moepeft.peft.build import Built
from moepeft.peft.method import Method
from moepeft.peft.method_text import flatten_expert, method_entry

# Kernels that are quantised lie under other names.
_PACKED = ('int8', 'nf4')
# A tap has no weight of its own: its scale goes into the next projection's
# inputs, which it multiplies feature by feature.
_NEXT = {'act': 'wo', 'hidden': 'wo'}
# The kernels' letters, by the last part of a site's path.
_EQUATIONS = {
  'q': 'btd,dnh->btnh',
  'k': 'btd,dnh->btnh',
  'v': 'btd,dnh->btnh',
  'o': 'btnh,nhd->btd',
  'wi': 'btd,df->btf',
  'wi_0': 'btd,df->btf',
  'wi_1': 'btd,df->btf',
  'wo': 'btf,fd->btd',
}


def merge(built: Built, variables: dict[str, Tree]) -> Tree:
  """A 'params' tree that does alone what base and adapters do together.

  A bias is changed only where a method scales outputs.

  Args:
    built: the method, from `build`.
    variables: {'params': ..., 'peft': ...}, layers stacked.

  Raises:
    ValueError: a method whose change depends on the token, full fine-tuning,
      which has nothing to merge, a site without a kernel to merge into, or
      a base that is quantised.
  """
  methods = _mergeable(built)
  params = flax.traverse_util.flatten_dict(variables['params'], sep='/')
  # A tap's scale also acts on what was added to the next kernel, so taps
  # come last; elsewhere the inner adapter comes first.
  order = sorted(
    built.adapter_map.entries, key=lambda e: e[0].split('/')[-1] in _NEXT
  )
  arrays = flax.traverse_util.flatten_dict(variables['peft'], sep='/')
  for site, adapter in order:
    method = methods[type(adapter)]
    stack, _, rest = site.partition('/')
    path = f'{stack}/layers/{rest}'
    if not any(p.startswith(f'{path}/{adapter.name}/') for p in arrays):
      path = site
    prefix = f'{path}/{adapter.name}/'
    peft = {
      p.removeprefix(prefix): a
      for p, a in arrays.items()
      if p.startswith(prefix)
    }
    module, _, place = path.rpartition('/')
    into = _NEXT.get(place, place)
    if place in _NEXT:
      adapter = dataclasses.replace(adapter, on='input')
    merge_weight = functools.partial(
      method.merge, adapter=adapter, eqn=_EQUATIONS.get(into)
    )
    weight = f'{module}/{into}/{method.merges_into}'
    _require_weight(params, weight)
    params[weight] = _each_layer(merge_weight, peft, params, weight)
    bias = f'{module}/{into}/bias'
    if bias in params and method.merge_bias is not None:
      merge_weight = functools.partial(method.merge_bias, adapter=adapter)
      params[bias] = _each_layer(merge_weight, peft, params, bias)
  return flax.traverse_util.unflatten_dict(params, sep='/')


def _each_layer(
  merge_weight: Callable, peft: Tree, params: Tree, path: str
) -> jax.Array:
  weight = jnp.asarray(params[path])
  run = lambda p, w: merge_weight(p, w)  # noqa: E731
  if '/layers/' in path:
    run = jax.vmap(run)
  return run(peft, weight).astype(weight.dtype)


def _require_weight(params: dict, path: str) -> None:
  kind = next((k for k in _PACKED if f'{path}_{k}' in params), None)
  if kind:
    raise ValueError(
      f'the base is quantised ({kind}): merge into what it decodes to '
      '(moepeft.checkpoints.quantize.unpack), which gives the same logits'
    )
  if path not in params:
    raise ValueError(
      f'the base has no array {path} to merge into; serve the adapter beside '
      'the base, or train it where the base has one, by `targets`'
    )


def is_mergeable(built: Built) -> bool:
  """Whether `merge` takes a method, as far as its text and sites tell."""
  try:
    _mergeable(built)
  except ValueError:
    return False
  return True


def _mergeable(built: Built) -> dict[type, Method]:
  """{adapter's type: its method}, or the reason why one has no merge."""
  methods = {}
  for spec in parse_method(built.method):
    method = method_entry(flatten_expert(spec))
    if method.merge is None:
      raise ValueError(f'{spec.name} cannot be merged: {method.why_not}')
    methods[method.module] = method
  inner = set()
  for site, adapter in built.adapter_map.entries:
    if methods[type(adapter)].merges_into == 'kernel':
      _check_kernel(site)
    if methods[type(adapter)].innermost and site in inner:
      raise ValueError(
        f'{adapter.name} cannot be merged at {site}: it goes by the norm of '
        "the base's kernel, which the adapter inside it changes; put it first"
      )
    inner.add(site)
  return methods


def _check_kernel(site: str) -> None:
  parts = site.split('/')
  if len(parts) != 3 or _NEXT.get(parts[2], parts[2]) not in _EQUATIONS:
    raise ValueError(f'the site {site} has no kernel that could be merged into')
