# SPDX-License-Identifier: Apache-2.0
"""What a run says at its start and end, and of its routers."""

import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moepeft import rows as rows_lib
from moepeft.interop import quantised
from moepeft.moe import stats
from moepeft.typing import State

# Of ln e: with a mean entropy of a token's weights from here on, a router mixes
# several experts, whichever has the most.
EVEN = 0.75


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
    total = quantised.parameters(state.frozen, base.config)
    held = quantised.size(state.frozen) / 1e6
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


def conclude(
  summary: Mapping[str, Any], places: Mapping[str, str | None]
) -> None:
  """Prints how long it took and where everything is."""
  lines = [f'done in {summary["seconds"]} s: {summary["method"]}']
  lines += [f'  {name:11}  {place}' for name, place in places.items() if place]
  print('\n'.join(lines), flush=True)


def routing(collection: Any) -> dict[str, dict[str, Any]]:
  """{site: statistics}, arrays as lists, one entry a layer.

  The shares of experts are under 'weight' or 'tokens'; see `rows.SHARES`.
  """
  rows = {}
  for site, sums in stats.by_site(jax.device_get(collection)).items():
    values = vars(stats.statistics(sums))
    share = values.pop('share')
    values = {'tokens' if values.pop('sparse') else 'weight': share} | values
    rows[site] = {
      name: np.round(np.asarray(value, np.float64), 4).tolist()
      for name, value in values.items()
    }
  return rows


def collapsed(
  sites: Mapping[str, Mapping[str, Any]], limit: float
) -> dict[str, str]:
  """{'site, layer n': what is so} where one expert has nearly all.

  A router is collapsed where one expert has more than `limit` of the weight
  (dense) or gets more than `limit` of the tokens (sparse), and the entropy of
  a token's weights is below EVEN of ln e. So a dense router that is even, with
  one expert ahead by little, is none.
  """
  lines = {}
  for site, values in sites.items():
    kind, shares = rows_lib.shares(values)
    entropies = np.atleast_1d(np.asarray(values['weight_entropy'], np.float64))
    for layer, (share, nats) in enumerate(zip(shares, entropies, strict=True)):
      if len(share) < 2 or max(share) <= limit:
        continue
      evenness = nats / np.log(len(share))
      if evenness < EVEN:
        has = (
          'gets {:.0%} of the tokens'
          if kind == 'tokens'
          else ('has {:.0%} of the weight')
        )
        lines[f'{site}, layer {layer}'] = (
          f'expert {int(np.argmax(share))} {has.format(max(share))}, the '
          f"entropy of a token's weights is {evenness:.2f} of ln "
          f'{len(share)} (config.router_alarm={limit})'
        )
  return lines
