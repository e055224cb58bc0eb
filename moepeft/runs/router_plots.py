# SPDX-License-Identifier: Apache-2.0
"""Figures of routers, a panel a site: shares by expert, entropy by layer.

A row of panels is a place (`encoder/self`), a panel in it what is adapted
there (`k`). Letters: e experts, l layers.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moepeft.runs.history import RoutingState, short_names

# Okabe and Ito's, which the colour-blind can tell apart.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#000000')
_DASHES = ('-', '--', '-.', ':')
# Blue for idle, white for even, red for overfull; and from first to last layer.
_LOADS, _DEPTHS = 'RdBu_r', 'viridis'
_SMALL, _TINY = 8, 7
# What people expect: encoder before decoder, q before k, in before out.
_ORDER = ('encoder', 'decoder', 'self', 'cross', 'mlp', 'q', 'k', 'v', 'o')

# {key of rows.SHARES: (title, subtitle)}.
_TITLES = {
  'weight': (
    'Mean weight of experts',
    'combine weights, mean over the tokens; every expert has some',
  ),
  'tokens': (
    'Token share of experts',
    'share of the tokens that are sent to an expert',
  ),
  'load': (
    'Argmax share of experts (an older log)',
    "share of the tokens whose largest weight is the expert's; no mean weight",
  ),
}

# {place: [(name, site)]}
Layout = dict[str, list[tuple[str, str]]]


def shares(states: Sequence[RoutingState], kind: str) -> Figure | None:
  """Heat maps [l, e] of the latest shares, and the fullest expert over steps.

  Args:
    kind: of rows.SHARES; None is returned where no site has shares of it.
  """
  if not states or kind not in states[-1].shares:
    return None
  now = states[-1].shares[kind]
  layout = _layout(now)
  # A token that is sent to k experts counts for k of them: k / e is even.
  even = min(float(np.nanmean(np.nanmean(a, -1))) for a in now.values())
  even = min(max(even, 1e-6), 1 - 1e-6)
  title, subtitle = _TITLES[kind]
  norm = TwoSlopeNorm(even, vmin=0, vmax=1)
  sheet = Sheet(layout, wide=2.9)
  sheet.title(f'{title} after step {states[-1].step:,}', subtitle)
  for row, (place, sites) in enumerate(layout.items()):
    for column, (name, site) in enumerate(sites):
      _heat(sheet.panel(row, column, name), now[site], norm)
    sheet.label(row, place, 'layer')
    curves = [(s.step, s.shares.get(kind, {})) for s in states]
    _fullest(sheet.wide_panel(row), curves, sites, even)
  sheet.colours(
    ScalarMappable(norm, _LOADS),
    {0: '0%', even: f'{even:.0%} (even)', 1: '100%'},
  )
  sheet.foot('expert', 'step')
  return sheet.figure


def entropy(states: Sequence[RoutingState]) -> Figure | None:
  """The router's mean entropy over steps, a line a layer; 1 is uniform."""
  if not states or not states[-1].entropies:
    return None
  now = states[-1].entropies
  layout = _layout(now)
  sheet = Sheet(layout)
  sheet.title('Router entropy', 'over its most, ln e: 1 is uniform, 0 certain')
  for row, (place, sites) in enumerate(layout.items()):
    for column, (name, site) in enumerate(sites):
      _lines(sheet.panel(row, column, name), states, site)
    sheet.label(row, place, 'entropy / ln e')
  if max(map(len, now.values())) > 1:
    ticks = {0: 'first layer', 1: 'last layer'}
    sheet.colours(ScalarMappable(Normalize(0, 1), _DEPTHS), ticks)
  sheet.foot('step', '')
  return sheet.figure


def _heat(axes: Axes, shares: np.ndarray, norm: Normalize) -> None:
  layers, experts = shares.shape
  axes.imshow(
    shares, cmap=_LOADS, norm=norm, aspect='auto', interpolation='nearest'
  )
  axes.set_xticks(_ends(experts))
  axes.set_yticks(_ends(layers))


def _ends(count: int) -> list[int]:
  return sorted({0, count - 1})


def _fullest(axes: Axes, curves, sites, even: float) -> None:
  """A line a site: the largest share of any expert of any layer.

  Args:
    curves: (step, {site: [l, e]}).
  """
  for i, (name, site) in enumerate(sites):
    axes.plot(
      [step for step, by_site in curves if site in by_site],
      [np.nanmax(by_site[site]) for _, by_site in curves if site in by_site],
      color=_COLOURS[i % len(_COLOURS)],
      linestyle=_DASHES[i % len(_DASHES)],
      lw=1.3,
      label=name,
    )
  axes.axhline(even, color='grey', lw=0.8, label='even')
  axes.set_ylim(0, 1.02)
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  _plain(axes)
  axes.legend(
    loc='upper left',
    bbox_to_anchor=(1.01, 1.05),
    fontsize=_TINY,
    frameon=False,
    handlelength=2.6,
  )


def _lines(axes: Axes, states, site: str) -> None:
  routed = [s for s in states if site in s.entropies]
  steps = np.array([s.step for s in routed], np.float64)
  values = np.stack([s.entropies[site] for s in routed], axis=1)
  lines = [np.stack([steps, v], axis=1) for v in values]
  depths = np.linspace(0, 1, len(lines)) if len(lines) > 1 else np.zeros(1)
  axes.add_collection(
    LineCollection(
      lines, array=depths, cmap=_DEPTHS, norm=Normalize(0, 1), lw=1.1
    )
  )
  margin = 0.02 * max(np.ptp(steps), 1)
  axes.set_xlim(steps[0] - margin, steps[-1] + margin)
  axes.set_ylim(0, 1.03)
  _plain(axes)


def _plain(axes: Axes) -> None:
  axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
  # Each label takes a millisecond to draw.
  axes.set_yticks([0, 0.5, 1])
  axes.grid(alpha=0.3, lw=0.5)
  axes.spines[['top', 'right']].set_visible(False)


def _layout(sites: Iterable[str]) -> Layout:
  places = {}
  for site, name in short_names(sorted(sites, key=_rank)).items():
    place, _, name = name.rpartition('/')
    places.setdefault(place, []).append((name, site))
  return places


def _rank(site: str) -> list[tuple[int, str]]:
  return [
    (_ORDER.index(part) if part in _ORDER else len(_ORDER), part)
    for part in site.split('/')
  ]


class Sheet:
  """A figure of panels placed in inches: layout engines take seconds."""

  SIDE, TALL, GAP = 1.45, 1.3, 0.36
  LEFT, RIGHT, TOP, BOTTOM = 0.95, 0.8, 0.95, 0.55

  def __init__(self, layout: Layout, wide: float = 0.0):
    """`wide`: inches of one panel more at the end of each row."""
    self._wide = wide
    self._rows = len(layout)
    self._columns = max(map(len, layout.values()))
    self._end = self.LEFT + self._columns * (self.SIDE + self.GAP) - self.GAP
    if wide:
      # And room for its legend.
      self._end += 2 * self.GAP + wide + 0.75
    self._width = max(self._end + self.RIGHT, 5.6)
    self._height = (
      self.TOP + self._rows * (self.TALL + self.GAP) - self.GAP + self.BOTTOM
    )
    self.figure = Figure(figsize=(self._width, self._height))
    self._first, self._last_wide, self._bottom = {}, None, {}

  def title(self, name: str, subtitle: str) -> None:
    place = dict(x=0.2 / self._width, ha='left', va='top')
    self.figure.text(y=1 - 0.15 / self._height, s=name, fontsize=12, **place)
    self.figure.text(
      y=1 - 0.4 / self._height,
      s=subtitle,
      fontsize=_SMALL,
      color='0.3',
      **place,
    )

  def panel(self, row: int, column: int, name: str) -> Axes:
    x = self.LEFT + column * (self.SIDE + self.GAP)
    axes = self._add(row, x, self.SIDE)
    axes.set_title(name, fontsize=_SMALL, pad=3)
    self._first.setdefault(row, axes)
    # The lowest panel of its column; the rows above have no axis label.
    self._bottom[column] = axes
    return axes

  def wide_panel(self, row: int) -> Axes:
    x = self.LEFT + self._columns * (self.SIDE + self.GAP) + self.GAP
    axes = self._last_wide = self._add(row, x, self._wide)
    if row == 0:
      axes.set_title('fullest expert of any layer', fontsize=_SMALL, pad=3)
    return axes

  def label(self, row: int, place: str, unit: str) -> None:
    axes = self._first[row]
    axes.set_ylabel(unit, fontsize=_SMALL)
    middle = self._under(row) + self.TALL / 2
    self.figure.text(
      0.2 / self._width,
      middle / self._height,
      place,
      rotation=90,
      ha='left',
      va='center',
      fontsize=9,
      weight='bold',
    )

  def foot(self, narrow: str, wide: str) -> None:
    for axes in self._bottom.values():
      axes.set_xlabel(narrow, fontsize=_SMALL)
    if self._last_wide is not None:
      self._last_wide.set_xlabel(wide, fontsize=_SMALL)

  def colours(self, colours: ScalarMappable, ticks: Mapping) -> None:
    """A bar that lies at the top right, beside the title."""
    wide = 1.9
    box = self._box(self._width - wide - 0.55, self._height - 0.4, wide, 0.13)
    bar = self.figure.colorbar(
      colours, cax=self.figure.add_axes(box), orientation='horizontal'
    )
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=_TINY)
    bar.minorticks_off()

  def _add(self, row: int, x: float, wide: float) -> Axes:
    box = self._box(x, self._under(row), wide, self.TALL)
    axes = self.figure.add_axes(box)
    axes.tick_params(labelsize=_TINY, length=2, pad=2)
    return axes

  def _under(self, row: int) -> float:
    return self._height - self.TOP - (row + 1) * self.TALL - row * self.GAP

  def _box(self, x, bottom, wide, tall) -> tuple[float, ...]:
    return (
      x / self._width,
      bottom / self._height,
      wide / self._width,
      tall / self._height,
    )
