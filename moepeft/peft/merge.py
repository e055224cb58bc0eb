# SPDX-License-Identifier: Apache-2.0
"""Folds adapters into the base where their change does not depend on x."""

import dataclasses
import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp

from moepeft.peft.build import Built
from moepeft.spec import parse_method
from moepeft.typing import Tree

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

  Args:
    built: the method, from `build`.
    variables: {'params': ..., 'peft': ...}, layers stacked.

  Raises:
    ValueError: a method whose change depends on the token, full fine-tuning,
      which has nothing to merge, or a site without a kernel to merge into.
  """
  methods = _mergeable(built)
  params = flax.traverse_util.flatten_dict(variables['params'], sep='/')
  # A tap's scale also acts on what was added to the next kernel, so taps
  # come last; elsewhere the inner adapter comes first.
  order = sorted(
    built.advice.entries, key=lambda e: e[0].split('/')[-1] in _NEXT
  )
  for site, adapter in order:
    stack, sublayer, place = _place(site)
    peft = variables['peft'][stack]['layers'][sublayer][place][adapter.name]
    into = _NEXT.get(place, place)
    if place in _NEXT:
      adapter = dataclasses.replace(adapter, on='input')
    one = functools.partial(
      methods[type(adapter)], adapter=adapter, eqn=_EQUATIONS[into]
    )
    path = f'{stack}/layers/{sublayer}/{into}/kernel'
    kernel = jnp.asarray(params[path])
    merged = jax.vmap(lambda p, w, one=one: one(p, kernel=w))(peft, kernel)
    params[path] = merged.astype(kernel.dtype)
  return flax.traverse_util.unflatten_dict(params, sep='/')


def _mergeable(built: Built) -> dict[type, Callable]:
  """{adapter's type: its merge}, or the reason why there is none."""
  from moepeft.peft import METHODS

  found = {}
  for spec in parse_method(built.method):
    method = METHODS[spec.name]
    if method.merge is None:
      raise ValueError(f'{spec.name} cannot be merged: {method.why_not}')
    found[method.module] = method.merge
  return found


def _place(site: str) -> tuple[str, str, str]:
  parts = site.split('/')
  if len(parts) != 3 or _NEXT.get(parts[2], parts[2]) not in _EQUATIONS:
    raise ValueError(f'the site {site} has no kernel that could be merged into')
  return tuple(parts)
