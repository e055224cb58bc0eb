# SPDX-License-Identifier: Apache-2.0
"""Plots of routers, a panel per site: shares by expert, entropy by layer.

A row of panels is a block (`encoder/self`), a panel one of its adapted
projections (`k`). Letters: e experts, l layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from unicodedata import east_asian_width

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moepeft.runs.history import RoutingState, SiteGrid, group_sites

# From the color-blind safe palette of Okabe and Ito.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#000000')
_DASHES = ('-', '--', '-.', ':')
# Blue for idle, white for even, red for overloaded; first to last layer.
SHARE_CMAP, _LAYER_CMAP = 'RdBu_r', 'viridis'
_LABEL_SIZE, _TICK_SIZE = 8, 7
# Inches of a letter of a label; Chinese characters are twice as wide.
_LETTER = 0.06

# {key of `metrics_log.SHARES`: (title, subtitle)}.
_TITLES = {
  'weight': (
    'Mean weight of experts',
    'combine weights, mean over the tokens; every expert has a weight',
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


def even_share(shares: Mapping[str, np.ndarray]) -> float:
  """The even share of an expert: 1 / e, or k / e if tokens go to k experts.

  It is away from 0 and 1, so that a color scale can be centered at it.

  Args:
    shares: {site: [l, e]}, NaN where a layer has fewer experts.
  """
  even = min(float(np.nanmean(np.nanmean(a, -1))) for a in shares.values())
  return min(max(even, 1e-6), 1 - 1e-6)


def shares(states: Sequence[RoutingState], kind: str) -> Figure | None:
  """Heat maps [l, e] of the latest shares, and the largest share over steps.

  Args:
    kind: key of `metrics_log.SHARES`; None is returned if no site has it.
  """
  if not states or kind not in states[-1].shares:
    return None
  latest = states[-1].shares[kind]
  grid = group_sites(latest)
  title, subtitle = _TITLES[kind]
  even = even_share(latest)
  norm = TwoSlopeNorm(even, vmin=0, vmax=1)
  panels = PanelGrid(grid, extra_width=2.9)
  panels.title(f'{title} after step {states[-1].step:,}', subtitle)
  for row, (place, sites) in enumerate(grid.items()):
    for column, (name, site) in enumerate(sites):
      _plot_heat_map(panels.panel(row, column, name), latest[site], norm)
    panels.label(row, place, 'layer')
    axes = panels.wide_panel(row, 'fullest expert of any layer')
    _plot_largest_shares(axes, states, kind, sites, even)
  panels.color_bar(
    ScalarMappable(norm, SHARE_CMAP),
    {0: '0%', even: f'{even:.0%} (even)', 1: '100%'},
  )
  panels.axis_labels('expert', 'step')
  return panels.figure


def entropy(states: Sequence[RoutingState]) -> Figure | None:
  """The router's mean entropy over steps, a line per layer; 1 is uniform."""
  if not states or not states[-1].entropies:
    return None
  latest = states[-1].entropies
  grid = group_sites(latest)
  panels = PanelGrid(grid)
  panels.title('Router entropy', 'divided by ln e: 1 is uniform')
  for row, (place, sites) in enumerate(grid.items()):
    for column, (name, site) in enumerate(sites):
      _plot_entropies(panels.panel(row, column, name), states, site)
    panels.label(row, place, 'entropy / ln e')
  if max(map(len, latest.values())) > 1:
    ticks = {0: 'first layer', 1: 'last layer'}
    panels.color_bar(ScalarMappable(Normalize(0, 1), _LAYER_CMAP), ticks)
  panels.axis_labels('step', '')
  return panels.figure


def _plot_heat_map(axes: Axes, shares: np.ndarray, norm: Normalize) -> None:
  layers, experts = shares.shape
  axes.imshow(
    shares, cmap=SHARE_CMAP, norm=norm, aspect='auto', interpolation='nearest'
  )
  axes.set_xticks(end_ticks(experts))
  axes.set_yticks(end_ticks(layers))


def end_ticks(count: int) -> list[int]:
  """The first and the last of `count` positions."""
  return sorted({0, count - 1})


def _plot_largest_shares(
  axes: Axes, states, kind: str, sites, even: float
) -> None:
  """Plots a line per site: the largest share of any expert of any layer."""
  curves = [(s.step, s.shares.get(kind, {})) for s in states]
  plot_lines(
    axes,
    {
      name: [(step, np.nanmax(a[site])) for step, a in curves if site in a]
      for name, site in sites
    },
  )
  axes.axhline(even, color='grey', lw=0.8, label='even')
  axes.set_ylim(0, 1.02)
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  add_legend(axes)


def left_margin(labels: Iterable[str]) -> float:
  """Inches for a panel's labels at the left, and for its block's."""
  columns = (
    sum(1 + (east_asian_width(c) in 'WF') for c in label) for label in labels
  )
  return 0.6 + _LETTER * max(columns, default=4)


def plot_lines(
  axes: Axes, lines: Mapping[str, Sequence[tuple[int, float]]]
) -> None:
  """Plots lines of (step, value)."""
  for i, (name, points) in enumerate(lines.items()):
    axes.plot(
      *zip(*points, strict=True),
      color=_COLORS[i % len(_COLORS)],
      linestyle=_DASHES[i % len(_DASHES)],
      lw=1.3,
      label=name,
    )
  _style_axes(axes)


def add_legend(axes: Axes) -> None:
  """Adds a legend at the right, in the room of a wide panel."""
  axes.legend(
    loc='upper left',
    bbox_to_anchor=(1.01, 1.05),
    fontsize=_TICK_SIZE,
    frameon=False,
    handlelength=2.6,
  )


def _plot_entropies(axes: Axes, states, site: str) -> None:
  site_states = [s for s in states if site in s.entropies]
  steps = np.array([s.step for s in site_states], np.float64)
  values = np.stack([s.entropies[site] for s in site_states], axis=1)
  lines = [np.stack([steps, v], axis=1) for v in values]
  depths = np.linspace(0, 1, len(lines)) if len(lines) > 1 else np.zeros(1)
  axes.add_collection(
    LineCollection(
      lines, array=depths, cmap=_LAYER_CMAP, norm=Normalize(0, 1), lw=1.1
    )
  )
  margin = 0.02 * max(np.ptp(steps), 1)
  axes.set_xlim(steps[0] - margin, steps[-1] + margin)
  axes.set_ylim(0, 1.03)
  _style_axes(axes)


def _style_axes(axes: Axes) -> None:
  axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
  # Each label takes a millisecond to draw.
  axes.set_yticks([0, 0.5, 1])
  axes.grid(alpha=0.3, lw=0.5)
  axes.spines[['top', 'right']].set_visible(False)


class PanelGrid:
  """A figure with panels placed in inches, as layout engines take seconds."""

  GAP = 0.36
  RIGHT, TOP, BOTTOM = 0.8, 0.95, 0.55

  def __init__(
    self,
    grid: SiteGrid,
    extra_width: float = 0.0,
    panel_size: tuple[float, float] = (1.45, 1.3),
    left: float = 0.95,
    min_width: float = 5.6,
  ):
    """
    Args:
      grid: {row: panels}.
      extra_width: inches of a further panel at the end of each row.
      panel_size: (width, height) in inches.
      left: inches for the labels at the left.
      min_width: inches of the figure, for the title and the color bar.
    """
    self._panel_width, self._panel_height = panel_size
    self._left = left
    self._wide_width = extra_width
    self._rows = len(grid)
    self._columns = max(map(len, grid.values()))
    step = self._panel_width + self.GAP
    self._right = self._left + self._columns * step - self.GAP
    if extra_width:
      # 0.75 inches for its legend.
      self._right += 2 * self.GAP + extra_width + 0.75
    self._width = max(self._right + self.RIGHT, min_width)
    self._height = (
      self.TOP
      + self._rows * (self._panel_height + self.GAP)
      - self.GAP
      + self.BOTTOM
    )
    self.figure = Figure(figsize=(self._width, self._height))
    self._first_panels, self._last_wide_panel, self._bottom_panels = (
      {},
      None,
      {},
    )

  def title(self, name: str, subtitle: str) -> None:
    place = dict(x=0.2 / self._width, ha='left', va='top')
    self.figure.text(y=1 - 0.15 / self._height, s=name, fontsize=12, **place)
    self.figure.text(
      y=1 - 0.4 / self._height,
      s=subtitle,
      fontsize=_LABEL_SIZE,
      color='0.3',
      **place,
    )

  def panel(self, row: int, column: int, name: str) -> Axes:
    x = self._left + column * (self._panel_width + self.GAP)
    axes = self._add(row, x, self._panel_width)
    axes.set_title(name, fontsize=_LABEL_SIZE, pad=3)
    self._first_panels.setdefault(row, axes)
    # The lowest panel of a column; only it has an axis label.
    self._bottom_panels[column] = axes
    return axes

  def wide_panel(self, row: int, title: str) -> Axes:
    x = self._left + self._columns * (self._panel_width + self.GAP) + self.GAP
    axes = self._last_wide_panel = self._add(row, x, self._wide_width)
    if row == 0:
      axes.set_title(title, fontsize=_LABEL_SIZE, pad=3)
    return axes

  def label(self, row: int, place: str, unit: str) -> None:
    axes = self._first_panels[row]
    axes.set_ylabel(unit, fontsize=_LABEL_SIZE)
    middle = self._panel_bottom(row) + self._panel_height / 2
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

  def axis_labels(self, narrow: str, wide: str) -> None:
    for axes in self._bottom_panels.values():
      axes.set_xlabel(narrow, fontsize=_LABEL_SIZE)
    if self._last_wide_panel is not None:
      self._last_wide_panel.set_xlabel(wide, fontsize=_LABEL_SIZE)

  def color_bar(self, mappable: ScalarMappable, ticks: Mapping) -> None:
    """A color bar at the top right, beside the title."""
    width, left = 1.9, self._width - 1.9 - 0.55
    box = self._fractions(left, self._height - 0.4, width, 0.13)
    bar = self.figure.colorbar(
      mappable, cax=self.figure.add_axes(box), orientation='horizontal'
    )
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=_TICK_SIZE)
    bar.minorticks_off()

  def _add(self, row: int, x: float, width: float) -> Axes:
    box = self._fractions(x, self._panel_bottom(row), width, self._panel_height)
    axes = self.figure.add_axes(box)
    axes.tick_params(labelsize=_TICK_SIZE, length=2, pad=2)
    return axes

  def _panel_bottom(self, row: int) -> float:
    return (
      self._height - self.TOP - (row + 1) * self._panel_height - row * self.GAP
    )

  def _fractions(self, x, bottom, width, height) -> tuple[float, ...]:
    return (
      x / self._width,
      bottom / self._height,
      width / self._width,
      height / self._height,
    )
