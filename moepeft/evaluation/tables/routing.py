# SPDX-License-Identifier: Apache-2.0
"""The routers of a run in a few figures; letters: l layers, e experts."""

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
from moepeft.runs.run import Run


@dataclasses.dataclass(frozen=True)
class RoutingSummary:
  """Over every site and layer that has more than one expert.

  Attributes:
    entropy: the mean of the routers' entropies over ln e: 1 is even, 0
      certain. Of the softmax of the logits, before any selection.
    tops: {key of rows.SHARES: (mean, largest)} of the shares of the fullest
      experts, over the sites that have this kind of share.
  """

  entropy: float
  tops: Mapping[str, tuple[float, float]]


def summary(sites: Mapping[str, tuple[str, Any, Any]]) -> RoutingSummary | None:
  """The figures of one row of metrics.jsonl; None where nothing is routed.

  Args:
    sites: {site: (key of rows.SHARES, shares [l, e], entropies in nats [l])};
      a share is NaN where the layer has no such expert.
  """
  entropies: list[np.ndarray] = []
  tops: dict[str, list[np.ndarray]] = {}
  for kind, shares, nats in sites.values():
    shares = np.asarray(shares, np.float64)
    counts = np.sum(~np.isnan(shares), axis=-1)
    several = counts > 1
    if several.any():
      nats = np.atleast_1d(np.asarray(nats, np.float64))
      entropies.append(nats[several] / np.log(counts[several]))
      tops.setdefault(kind, []).append(np.nanmax(shares[several], axis=-1))
  if not tops:
    return None
  each = {kind: np.concatenate(values) for kind, values in tops.items()}
  return RoutingSummary(
    float(np.concatenate(entropies).mean()),
    {
      kind: (float(values.mean()), float(values.max()))
      for kind, values in each.items()
    },
  )


ENTROPY = Column('entropy', 'router entropy', 'share')
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
  """The cells of a table's row, which is a run for each seed.

  Empty where nothing is routed, or where any of the runs has no metrics; a
  share is there where all of the runs have it.
  """
  runs = [routing_of(entry) for entry in entries]
  if None in runs:
    return {}
  result: dict[Any, Cell] = {
    ENTROPY.key: Cell(float(np.mean([run.entropy for run in runs])))
  }
  for kind in metrics_log.SHARES:
    if all(kind in run.tops for run in runs):
      top, worst = np.mean([run.tops[kind] for run in runs], axis=0)
      result[kind, 'top'] = Cell(float(top))
      result[kind, 'worst'] = Cell(float(worst))
  return result


def columns(lines: Iterable[Mapping[Any, Cell]]) -> list[Column]:
  """The entropy, and two columns for each kind of share in some `cells`."""
  keys = {key for line in lines for key in line}
  pairs = [
    column
    for kind, name in metrics_log.SHARES.items()
    for column in (
      Column((kind, 'top'), f'fullest expert, {name}', 'share'),
      Column((kind, 'worst'), f'{name}, worst site', 'share'),
    )
    if column.key in keys
  ]
  return [ENTROPY, *pairs]


def notes(shown: Sequence[Column]) -> list[str]:
  """Remarks on `columns`."""
  kinds = [
    kind
    for kind in metrics_log.SHARES
    if (kind, 'top') in {c.key for c in shown}
  ]
  return [
    'Routing is that of the last batch that the metrics of a run have, over '
    'sites and layers: the mean entropy of the routers over ln e (1 is even; '
    'before any selection), and the share of the fullest expert, on average '
    'and at the worst site; means over seeds; missing where nothing is routed '
    'or a seed has no metrics.jsonl.',
    *(_NOTES[kind] for kind in kinds),
  ]


def routing_of(entry: RunResults) -> RoutingSummary | None:
  """The last routing in metrics.jsonl, up to the step that was evaluated."""
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
  """(key of rows.SHARES, [l, e]) of a site, an older log's told apart.

  There a token counts 1/k for each of its k experts, so that k times as much
  is the token share of a sparse router.
  """
  kind, shares = metrics_log.share_array(values)
  if kind == 'load':
    name = site.rpartition('/')[2]
    k = _selected(entry.method, entry.semantics).get(name)
    if k is not None:
      return 'tokens', k * shares
  return kind, shares


@functools.cache
def _selected(method: str, semantics: str) -> dict[str, int]:
  """{adapter's name: k} of a method's sparse routers, from their routing."""
  forms = {
    name: jax.eval_shape(
      lambda router=router: router.init_with_output(
        {'peft': jax.random.key(0), 'router': jax.random.key(0)},
        jnp.zeros((1, 1, 1)),
        Context(),
      )[0]
    )
    for name, router in routers(method, semantics).items()
  }
  return {name: form.k for name, form in forms.items() if form.sparse}
