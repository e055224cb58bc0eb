# SPDX-License-Identifier: Apache-2.0
"""The state of a run's routers in words: shares, idle experts, collapse."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from moepeft.runs import metrics_log
from moepeft.runs.metrics_log import is_number

# Of ln e: with a mean entropy of a token's weights from here on, a router mixes
# several experts, whichever has the most.
EVEN = 0.75
# The share of one expert that is a collapse (the default of
# config.router_collapse_threshold), for so many logs in a row, and that of one
# that is idle.
_FULL, _IN_A_ROW, _IDLE = 0.9, 3, 0.01


def collapsed_routers(
  sites: Mapping[str, Mapping[str, Any]], limit: float
) -> dict[str, str]:
  """{'site, layer n': what is so} where one expert has nearly all.

  A router is collapsed where one expert has more than `limit` of the weight
  (dense) or gets more than `limit` of the tokens (sparse), and the entropy of
  a token's weights is below EVEN of ln e. So a dense router that is even, with
  one expert ahead by little, is none.

  Args:
    sites: a row's 'routing'. Of older rows, with 'load', the entropy is the
      router's before any selection, as they have no other.
  """
  lines = {}
  for site, layer, kind, shares, values in _layers(sites):
    key = 'entropy' if kind == 'load' else 'weight_entropy'
    nats = values.get(key)
    if nats is None or max(shares) <= limit:
      continue
    most = math.log(len(shares))
    evenness, bound = nats / most, EVEN
    if kind == 'load':
      # That an expert with `limit` of the weight leaves at most, the others
      # sharing the rest evenly.
      rest = 1 - limit
      rest_entropy = (
        rest * math.log(rest / (len(shares) - 1)) if rest > 0 else 0.0
      )
      bound = (-limit * math.log(limit) - rest_entropy) / most
    if evenness < bound:
      has = {
        'weight': 'has {:.0%} of the weight',
        'tokens': 'gets {:.0%} of the tokens',
        'load': 'has the largest weight for {:.0%} of the tokens',
      }[kind].format(max(shares))
      lines[f'{site}, layer {layer}'] = (
        f"expert {shares.index(max(shares))} {has}, the entropy of a token's "
        f'weights is {evenness:.2f} of ln {len(shares)} '
        f'(config.router_collapse_threshold={limit})'
      )
  return lines


def _layers(
  sites: Mapping[str, Any],
) -> Iterator[tuple[str, int, str, list[float], dict[str, float]]]:
  """(site, layer, key of rows.SHARES, shares, entropies) of routers with
  several experts; what is no routing is left out."""
  for site, values in sites.items():
    if not isinstance(values, dict) or not metrics_log.SHARES.keys() & values:
      continue
    kind, layers = metrics_log.shares(values)
    entropies = {}
    for key in ('entropy', 'weight_entropy'):
      value = values.get(key)
      entropies[key] = value if isinstance(value, list) else [value]
    for layer, shares in enumerate(layers):
      shares = [s if is_number(s) else 0.0 for s in shares]
      if len(shares) > 1:
        yield (
          site,
          layer,
          kind,
          shares,
          {
            key: by_layer[layer]
            for key, by_layer in entropies.items()
            if layer < len(by_layer) and is_number(by_layer[layer])
          },
        )


def router_lines(trained: list[dict]) -> list[str]:
  routed = [row for row in trained if isinstance(row.get('routing'), dict)]
  routed = [row for row in routed if row['routing']]
  if not routed:
    return ['routers: none']
  step, layers = routed[-1]['step'], list(_layers(routed[-1]['routing']))
  if not layers:
    return ['routers: of one expert each']
  lines = [f'routers at step {step}: {len(layers)}']
  entropies = [
    values['entropy'] / math.log(len(shares))
    for *_, shares, values in layers
    if 'entropy' in values
  ]
  if entropies:
    lines[0] += f', entropy {statistics.fmean(entropies):.0%} of its most'
  for kind in metrics_log.SHARES:
    lines += _shares(kind, [layer for layer in layers if layer[2] == kind])
  full = [
    collapsed_routers(row['routing'], _FULL) for row in routed[-_IN_A_ROW:]
  ]
  lasting = [place for place in full[-1] if all(place in log for log in full)]
  if lasting:
    lines.append(
      f'! router collapse: one expert has over {_FULL:.0%} (see '
      f'references/curves.md) in the last {len(full)} logs at {len(lasting)} '
      f'of {len(layers)}: {", ".join(lasting[:5])}'
      + (' ...' if len(lasting) > 5 else '')
    )
  return lines


def _shares(kind: str, layers: list[tuple]) -> list[str]:
  """A line on one kind of share, and idle experts."""
  if not layers:
    return []
  tops = sorted(((max(row[3]), row) for row in layers), key=lambda p: -p[0])
  most, (site, layer, *_) = tops[0]
  mean = statistics.fmean(top for top, _ in tops)
  idle = sum(share < _IDLE for *_, shares, _ in layers for share in shares)
  every = sum(len(shares) for *_, shares, _ in layers)
  line = {
    'weight': 'dense: the fullest expert has {} of the weight',
    'tokens': 'sparse: the fullest expert gets {} of the tokens',
    'load': 'argmax share (an older log, no mean weights): the fullest expert '
    'has the largest weight for {} of the tokens',
  }[kind].format(f'{mean:.0%}')
  line += (
    f' on average, {most:.0%} at most ({site} {layer}); {idle} of {every} '
    f'experts below {_IDLE:.0%}'
  )
  # An expert that never has the largest weight may have much of it.
  if kind != 'load' and idle > every / 4:
    return [line, f'! {idle} of {every} experts are idle']
  return [line]
