# SPDX-License-Identifier: Apache-2.0
"""Summarizes the routers of a run; shapes have l layers and e experts."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Context
from moepeft.evaluation.tables.render import Cell, Column
from moepeft.evaluation.tables.run_results import RunResults
from moepeft.peft.build import routers
from moepeft.runs import metrics_log
from moepeft.runs.router_diagnosis import DEAD_SHARE
from moepeft.runs.run import Run

# The kind of share that counts largest weights.
_ARGMAX = 'load'


@dataclasses.dataclass(frozen=True)
class RoutingSummary:
  """Statistics over all sites and layers with more than one expert.

  Attributes:
    entropy: the mean of the routers' entropies divided by ln e, between 0 and
      1, of the softmax of the logits before the selection of experts.
    max_shares: key of `metrics_log.SHARES` -> (mean, maximum) of each layer's
      largest share, over the sites with this kind of share.
    dead: the fraction of experts with at most 1 % of an even share; None if
      shares are of the largest weights only, which do not show it.
  """

  entropy: float
  max_shares: Mapping[str, tuple[float, float]]
  dead: float | None = None


def summary(sites: Mapping[str, tuple[str, Any, Any]]) -> RoutingSummary | None:
  """Summarizes one row of metrics.jsonl; None without routers.

  Args:
    sites: site -> (key of `metrics_log.SHARES`, shares [l, e], entropies in
      nats [l]); shares are padded with NaN.
  """
  entropies: list[np.ndarray] = []
  max_shares: dict[str, list[np.ndarray]] = {}
  dead, experts = 0, 0
  for kind, shares, nats in sites.values():
    shares = np.asarray(shares, np.float64)
    counts = np.sum(~np.isnan(shares), axis=-1)
    is_routed = counts > 1
    if is_routed.any():
      nats = np.atleast_1d(np.asarray(nats, np.float64))
      entropies.append(nats[is_routed] / np.log(counts[is_routed]))
      largest = np.nanmax(shares[is_routed], axis=-1)
      max_shares.setdefault(kind, []).append(largest)
      # k / e of a sparse router, 1 / e of one whose weights sum to one.
      even = np.nanmean(shares[is_routed], axis=-1, keepdims=True)
      dead += np.sum(shares[is_routed] <= DEAD_SHARE * even)
      experts += counts[is_routed].sum()
  if not max_shares:
    return None
  by_kind = {kind: np.concatenate(v) for kind, v in max_shares.items()}
  return RoutingSummary(
    float(np.concatenate(entropies).mean()),
    {
      kind: (float(values.mean()), float(values.max()))
      for kind, values in by_kind.items()
    },
    None if _ARGMAX in max_shares else float(dead / experts),
  )


ENTROPY = Column('entropy', 'router entropy', 'share')
DEAD = Column('dead', 'dead experts', 'share')
_DEAD_NOTE = (
  'Dead experts are those whose share is at most 1 % of an even one, the mean '
  'of their layer, as a fraction of all experts.'
)
_NOTES = {
  'weight': (
    'Mean weight is of dense routers: the mean over the tokens of the combine '
    'weight of the fullest of the e experts (1/e is even).'
  ),
  'tokens': (
    'Token share is of sparse routers: the share of the tokens that are sent '
    'to the fullest of the e experts (k/e is even).'
  ),
  'load': (
    'Argmax share is what older logs have of dense routers instead of mean '
    'weights: the share of the tokens for which an expert has the largest '
    'weight. It does not say how much weight the expert has; the entropy does.'
  ),
}


def cells(entries: Sequence[RunResults]) -> dict[Any, Cell]:
  """The cells of a table's row, means over its runs.

  There are none if a run has no routers or no metrics. A share has cells if all
  runs have this kind of share.
  """
  runs = [routing_of(entry) for entry in entries]
  if None in runs:
    return {}
  result: dict[Any, Cell] = {
    ENTROPY.key: Cell(float(np.mean([run.entropy for run in runs])))
  }
  if all(run.dead is not None for run in runs):
    result[DEAD.key] = Cell(float(np.mean([run.dead for run in runs])))
  for kind in metrics_log.SHARES:
    if all(kind in run.max_shares for run in runs):
      mean, largest = np.mean([run.max_shares[kind] for run in runs], axis=0)
      result[kind, 'top'] = Cell(float(mean))
      result[kind, 'worst'] = Cell(float(largest))
  return result


def columns(lines: Iterable[Mapping[Any, Cell]]) -> list[Column]:
  """Columns of the entropy, dead experts, and two for each kind of share.

  Those that no line has are left out, except for the entropy's.
  """
  keys = {key for line in lines for key in line}
  share_columns = [
    column
    for kind, name in metrics_log.SHARES.items()
    for column in (
      Column((kind, 'top'), f'fullest expert, {name}', 'share'),
      Column((kind, 'worst'), f'{name}, worst site', 'share'),
    )
    if column.key in keys
  ]
  return [ENTROPY, *([DEAD] if DEAD.key in keys else ()), *share_columns]


def notes(columns: Sequence[Column]) -> list[str]:
  """Footnotes on `columns`."""
  kinds = [
    kind
    for kind in metrics_log.SHARES
    if (kind, 'top') in {c.key for c in columns}
  ]
  return [
    'Routing is that of the last batch that the metrics of a run have, over '
    'sites and layers: the mean entropy of the routers over ln e (1 is even; '
    'before any selection), and the share of the fullest expert, on average '
    'and at the worst site; means over seeds; missing where nothing is routed '
    'or a seed has no metrics.jsonl.',
    *([_DEAD_NOTE] if DEAD in columns else ()),
    *(_NOTES[kind] for kind in kinds),
  ]


def routing_of(entry: RunResults) -> RoutingSummary | None:
  """The last routing in metrics.jsonl up to the evaluated step."""
  if entry.is_base:
    return None
  last: Mapping[str, Any] = {}
  for row in Run(entry.folder).metrics():
    if row['step'] <= entry.step and row.get('routing'):
      last = row['routing']
  return summary(
    {
      site: (*_shares(site, values, entry), values['entropy'])
      for site, values in last.items()
    }
  )


def _shares(
  site: str, values: Mapping[str, Any], entry: RunResults
) -> tuple[str, np.ndarray]:
  """(key of `metrics_log.SHARES`, [l, e]) of a site.

  Older logs have 'load' for sparse routers, in which a token counts 1/k for
  each of its k experts; it is converted to the token share.
  """
  kind, shares = metrics_log.share_array(values)
  if kind == 'load':
    name = site.rpartition('/')[2]
    k = _experts_per_token(entry.method, entry.semantics).get(name)
    if k is not None:
      return 'tokens', k * shares
  return kind, shares


@functools.cache
def _experts_per_token(method: str, semantics: str) -> dict[str, int]:
  """Adapter's name -> k, of a method's sparse routers."""
  routings = {
    name: jax.eval_shape(
      lambda router=router: router.init_with_output(
        {'peft': jax.random.key(0), 'router': jax.random.key(0)},
        jnp.zeros((1, 1, 1)),
        Context(),
      )[0]
    )
    for name, router in routers(method, semantics).items()
  }
  return {
    name: routing.k for name, routing in routings.items() if routing.sparse
  }
