# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run that plots need, thinned out as they come."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moepeft.runs import metrics_log

# Metrics of preference objectives; of validation too.
PREFERENCE_METRICS = (
  'rewards_chosen',
  'rewards_rejected',
  'margins',
  'accuracies',
  'kl',
  'z_ref',
)
# Points that a curve is drawn with at most, and states of the routers.
_POINTS, _STATES = 2000, 150


@dataclasses.dataclass(frozen=True)
class RoutingState:
  """The routers at one step; letters: e experts, l layers.

  Attributes:
    step: that was just done.
    shares: {key of rows.SHARES: {site: [l, e]}}, NaN where a layer has no
      such expert.
    entropies: {site: [l]} mean entropies over their most, ln e; NaN where a
      layer has one expert.
  """

  step: int
  shares: Mapping[str, Mapping[str, np.ndarray]]
  entropies: Mapping[str, np.ndarray]


def short_names(sites: Iterable[str]) -> dict[str, str]:
  """{site: how people call it}: encoder/layers/self/k/mov is encoder/self/k.

  The last part, the method, is told only where there is more than one.
  """
  sites = list(sites)
  several = len({site.rpartition('/')[2] for site in sites}) > 1
  names = {}
  for site in sites:
    path, _, method = site.rpartition('/')
    name = '/'.join(part for part in path.split('/') if part != 'layers')
    names[site] = f'{name} ({method})' if several else name
  return names


class Thinned:
  """A list of at most so many, evenly spread, and always the latest."""

  def __init__(self, most: int, convert: Callable[[Any], Any]):
    """`convert` is applied to what is kept alone."""
    self._most, self._convert = most, convert
    self._items, self._every, self._count = [], 1, 0
    self._latest = None

  def add(self, item: Any) -> None:
    self._latest = item
    if self._count % self._every == 0:
      self._items.append(self._convert(item))
      if len(self._items) > self._most:
        self._items = self._items[::2]
        self._every *= 2
    self._count += 1

  def items(self) -> list[Any]:
    if not self._count:
      return []
    if (self._count - 1) % self._every == 0:
      return self._items
    return [*self._items, self._convert(self._latest)]


class History:
  """A writer that keeps rows for `moepeft.runs.plots`, in bounded memory."""

  def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
    """`rows`: of the run so far."""
    point = lambda key: lambda row: (row['step'], _number(row[key]))  # noqa: E731
    self._curves = {
      key: Thinned(_POINTS, point(key))
      for key in (
        *('loss', 'nll', 'learning_rate', 'validation_loss'),
        *PREFERENCE_METRICS,
        *(f'validation_{key}' for key in PREFERENCE_METRICS),
      )
    }
    self._routing = Thinned(_STATES, _routing)
    for row in rows:
      self.write(row)

  def write(self, row: Mapping[str, Any]) -> None:
    for key, curve in self._curves.items():
      if key in row:
        curve.add(row)
    if row.get('routing'):
      self._routing.add(row)

  def close(self) -> None:
    pass

  def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of 'loss', 'nll', 'learning_rate', 'validation_loss',
    PREFERENCE_METRICS, and one of these after 'validation_'."""
    points = np.asarray(self._curves[key].items(), np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]

  def last(self, key: str) -> int | None:
    """The last step that has a figure, one of `curve`'s; None without one."""
    steps, _ = self.curve(key)
    return int(steps[-1]) if len(steps) else None

  def routing(self) -> list[RoutingState]:
    """The routers over time; none where nothing is routed."""
    return self._routing.items()


def _number(value: float | None) -> float:
  return np.nan if value is None else value


def _routing(row: Mapping[str, Any]) -> RoutingState:
  shares, entropies = {}, {}
  for site, values in row['routing'].items():
    kind, share = metrics_log.share_array(values)
    if share.shape[-1] > 1:
      counts = np.array([len(layer) for layer in metrics_log.shares(values)[1]])
      most = np.where(counts > 1, np.log(np.maximum(counts, 2)), np.nan)
      shares.setdefault(kind, {})[site] = share
      entropies[site] = np.atleast_1d(
        np.asarray(values['entropy'], np.float64) / most
      )
  return RoutingState(row['step'], shares, entropies)
