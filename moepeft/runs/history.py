# SPDX-License-Identifier: Apache-2.0
"""Collects the metrics of a run for plots, subsampled in bounded memory."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moepeft.runs import metrics_log

# Metrics of preference objectives, in training and validation.
PREFERENCE_METRICS = (
  'rewards_chosen',
  'rewards_rejected',
  'margins',
  'accuracies',
  'kl',
  'z_ref',
)
_MAX_CURVE_POINTS, _MAX_ROUTING_STATES = 2000, 150
# The order of sites in the model.
_ORDER = ('encoder', 'decoder', 'self', 'cross', 'mlp', 'q', 'k', 'v', 'o')

# {block: [(name, site)]}
SiteGrid = dict[str, list[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class RoutingState:
  """The routers at one step, with l layers and e experts.

  Attributes:
    step: the step that was just done.
    shares: key of `metrics_log.SHARES` -> site -> [l, e], padded with NaN.
    entropies: site -> [l], mean entropies divided by ln e, their maximum; NaN
      for layers with one expert.
  """

  step: int
  shares: Mapping[str, Mapping[str, np.ndarray]]
  entropies: Mapping[str, np.ndarray]


def short_names(sites: Iterable[str]) -> dict[str, str]:
  """Site -> short name: encoder/layers/self/k/mov is encoder/self/k.

  The last part, the method, is added in parentheses if there are several.
  """
  sites = list(sites)
  show_method = len({site.rpartition('/')[2] for site in sites}) > 1
  names = {}
  for site in sites:
    path, _, method = site.rpartition('/')
    name = '/'.join(part for part in path.split('/') if part != 'layers')
    names[site] = f'{name} ({method})' if show_method else name
  return names


def site_order(site: str) -> list[tuple[int, str]]:
  """A key that sorts sites in the order of the model."""
  return [
    (_ORDER.index(part) if part in _ORDER else len(_ORDER), part)
    for part in site.split('/')
  ]


def group_sites(sites: Iterable[str]) -> SiteGrid:
  """Sites by block, `encoder/self`, with the names of its projections."""
  blocks = {}
  for site, name in short_names(sorted(sites, key=site_order)).items():
    block, _, name = name.rpartition('/')
    blocks.setdefault(block, []).append((name, site))
  return blocks


class Subsample:
  """Keeps a bounded number of evenly spaced items, and always the latest."""

  def __init__(self, max_items: int, convert: Callable[[Any], Any]):
    """
    Args:
      convert: applied to the items that are kept.
    """
    self._max_items, self._convert = max_items, convert
    self._items, self._stride, self._count = [], 1, 0
    self._latest = None

  def add(self, item: Any) -> None:
    self._latest = item
    if self._count % self._stride == 0:
      self._items.append(self._convert(item))
      if len(self._items) > self._max_items:
        self._items = self._items[::2]
        self._stride *= 2
    self._count += 1

  def items(self) -> list[Any]:
    if not self._count:
      return []
    if (self._count - 1) % self._stride == 0:
      return self._items
    return [*self._items, self._convert(self._latest)]


class History:
  """A tracker that keeps rows for `moepeft.runs.plots`, in bounded memory."""

  def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
    """
    Args:
      rows: the run's rows so far.
    """
    point = lambda key: lambda row: (row['step'], _number(row[key]))  # noqa: E731
    self._curves = {
      key: Subsample(_MAX_CURVE_POINTS, point(key))
      for key in (
        *('loss', 'nll', 'learning_rate', 'validation_loss'),
        *PREFERENCE_METRICS,
        *(f'validation_{key}' for key in PREFERENCE_METRICS),
      )
    }
    self._routing = Subsample(_MAX_ROUTING_STATES, _routing_state)
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
    """(steps, values) of a metric, float64 [n] each.

    Args:
      key: 'loss', 'nll', 'learning_rate', 'validation_loss', or one of
        PREFERENCE_METRICS with or without 'validation_' before it.
    """
    points = np.asarray(self._curves[key].items(), np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]

  def last_step(self, key: str) -> int | None:
    """The last step with a value of a metric of `curve`, or None."""
    steps, _ = self.curve(key)
    return int(steps[-1]) if len(steps) else None

  def routing(self) -> list[RoutingState]:
    """The routers' states in order of steps; [] without routers."""
    return self._routing.items()


def _number(value: float | None) -> float:
  return np.nan if value is None else value


def _routing_state(row: Mapping[str, Any]) -> RoutingState:
  shares, entropies = {}, {}
  for site, values in row['routing'].items():
    kind, share = metrics_log.share_array(values)
    if share.shape[-1] > 1:
      counts = np.array([len(layer) for layer in metrics_log.shares(values)[1]])
      max_entropy = np.where(counts > 1, np.log(np.maximum(counts, 2)), np.nan)
      shares.setdefault(kind, {})[site] = share
      entropies[site] = np.atleast_1d(
        np.asarray(values['entropy'], np.float64) / max_entropy
      )
  return RoutingState(row['step'], shares, entropies)
