# SPDX-License-Identifier: Apache-2.0
"""Describes a run's routers: expert shares, idle experts, collapse."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from moepeft.runs import metrics_log
from moepeft.runs.metrics_log import is_number

# A router whose mean entropy of a token's weights is at least this fraction of
# ln e mixes several experts, and is not collapsed.
EVEN_ENTROPY = 0.75
# An expert's share that counts as collapse, as the default of
# config.router_collapse_threshold, if it lasts for _COLLAPSE_ROWS logs.
_COLLAPSE_SHARE, _COLLAPSE_ROWS = 0.9, 3
_IDLE_SHARE = 0.01
# Of an even share; an expert with at most that is dead.
DEAD_SHARE = 0.01


def collapsed_routers(
  sites: Mapping[str, Mapping[str, Any]], limit: float
) -> dict[str, str]:
  """'site, layer n' of each collapsed router -> a description.

  A router is collapsed if one expert has more than `limit` of the weight
  (dense) or of the tokens (sparse), and the entropy of a token's weights is
  below EVEN_ENTROPY ln e. The second condition excludes dense routers whose
  weights are nearly equal.

  Args:
    sites: a row's 'routing'. Older rows, with 'load', only have the entropy of
      the router before the selection of experts, which is used for them.
    limit: a share between 0 and 1.
  """
  lines = {}
  for site, layer, kind, shares, values in _layers(sites):
    key = 'entropy' if kind == 'load' else 'weight_entropy'
    nats = values.get(key)
    if nats is None or max(shares) <= limit:
      continue
    max_entropy = math.log(len(shares))
    entropy, bound = nats / max_entropy, EVEN_ENTROPY
    if kind == 'load':
      # The entropy of one expert with `limit` of the weight, if all others
      # have equal weights.
      rest = 1 - limit
      rest_entropy = (
        -rest * math.log(rest / (len(shares) - 1)) if rest > 0 else 0.0
      )
      bound = (-limit * math.log(limit) + rest_entropy) / max_entropy
    if entropy < bound:
      description = {
        'weight': 'has {:.0%} of the weight',
        'tokens': 'gets {:.0%} of the tokens',
        'load': 'has the largest weight for {:.0%} of the tokens',
      }[kind].format(max(shares))
      lines[f'{site}, layer {layer}'] = (
        f'expert {shares.index(max(shares))} {description}, the entropy of a '
        f"token's weights is {entropy:.2f} of ln {len(shares)} "
        f'(config.router_collapse_threshold={limit})'
      )
  return lines


def _layers(
  sites: Mapping[str, Any],
) -> Iterator[tuple[str, int, str, list[float], dict[str, float]]]:
  """Yields (site, layer, key of SHARES, shares, entropies) of each router.

  Routers with one expert, and sites without shares, are left out.
  """
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


def dead_experts(sites: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
  """(experts with at most 1 % of an even share, all experts), of all layers.

  The even share is the mean of the layer: k / e of a router that gives each
  token k experts, 1 / e of one whose weights sum to one. Routers with one
  expert are left out, and logs of older versions, which have no mean shares.

  Args:
    sites: a row's 'routing'.
  """
  layers = [
    shares for _, _, kind, shares, _ in _layers(sites) if kind != 'load'
  ]
  dead = sum(
    share <= DEAD_SHARE * statistics.fmean(shares)
    for shares in layers
    for share in shares
  )
  return dead, sum(map(len, layers))


def router_lines(trained: list[dict]) -> list[str]:
  """Lines about the routers of training rows; findings begin with '!'."""
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
    lines += _share_lines(kind, [layer for layer in layers if layer[2] == kind])
  collapsed = [
    collapsed_routers(row['routing'], _COLLAPSE_SHARE)
    for row in routed[-_COLLAPSE_ROWS:]
  ]
  lasting = [
    router for router in collapsed[-1] if all(router in c for c in collapsed)
  ]
  if lasting:
    lines.append(
      f'! router collapse: one expert has over {_COLLAPSE_SHARE:.0%} (see '
      f'references/curves.md) in the last {len(collapsed)} logs at '
      f'{len(lasting)} of {len(layers)}: {", ".join(lasting[:5])}'
      + (' ...' if len(lasting) > 5 else '')
    )
  return lines


def _share_lines(kind: str, layers: list[tuple]) -> list[str]:
  """Lines about the shares of one kind, and about idle experts."""
  if not layers:
    return []
  max_shares = [max(shares) for *_, shares, _ in layers]
  largest, mean = max(max_shares), statistics.fmean(max_shares)
  site, layer, *_ = layers[max_shares.index(largest)]
  idle = sum(
    share < _IDLE_SHARE for *_, shares, _ in layers for share in shares
  )
  total = sum(len(shares) for *_, shares, _ in layers)
  line = {
    'weight': 'dense: the fullest expert has {} of the weight',
    'tokens': 'sparse: the fullest expert gets {} of the tokens',
    'load': 'argmax share (an older log, no mean weights): the fullest expert '
    'has the largest weight for {} of the tokens',
  }[kind].format(f'{mean:.0%}')
  line += (
    f' on average, {largest:.0%} at most ({site} {layer}); {idle} of {total} '
    f'experts below {_IDLE_SHARE:.0%}'
  )
  # 'load' counts largest weights only, so its zeros do not show idle experts.
  if kind != 'load' and idle > total / 4:
    return [line, f'! {idle} of {total} experts are idle']
  return [line]
