# SPDX-License-Identifier: Apache-2.0
"""What a run says at its start, and of its routers."""

import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moepeft.checkpoints import quantize
from moepeft.core.types import State
from moepeft.moe import router_stats


def introduce(
  base: Any,
  built: Any,
  state: State,
  words: Any,
  workdir: str,
  more: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
  """Prints what is about to be trained: method, base, sizes, devices.

  Args:
    more: {name: what} of further lines, like 'packing'; empty ones are left.
  """
  size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))  # noqa: E731
  trained, frozen = size(state.trainable), size(state.frozen)
  total, kept = trained if built.trainable == 'params' else frozen, ''
  if base.quantise:
    total = quantize.parameters(state.frozen, base.config)
    held = quantize.size(state.frozen) / 1e6
    kept = f', projections in {base.quantise}: {held:.4g} MB in all'
  lines = {
    'method': f'{built.method} ({built.semantics} semantics)',
    'base': f'{base.path or "random weights"}, {total:,} parameters{kept}',
    'trained': f'{trained:,} parameters ({100 * trained / total:.2f} %)',
    'tokens': words,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    **more,
    'workdir': workdir,
  }
  wide = max(map(len, lines))
  for name, line in lines.items():
    if line:
      print(f'{name:{wide}}  {line}', flush=True)


def routing(collection: Any) -> dict[str, dict[str, Any]]:
  """{site: statistics}, arrays as lists, one entry a layer.

  The shares of experts are under 'weight' or 'tokens'; see `rows.SHARES`.
  """
  rows = {}
  for site, sums in router_stats.collect(jax.device_get(collection)).items():
    values = vars(router_stats.statistics(sums))
    share = values.pop('share')
    values = {'tokens' if values.pop('sparse') else 'weight': share} | values
    rows[site] = {
      name: np.round(np.asarray(value, np.float64), 4).tolist()
      for name, value in values.items()
    }
  return rows
