# SPDX-License-Identifier: Apache-2.0
"""Plot of the experts over training: their shares, and how many are dead.

A panel of a site has a row for each expert of each layer, and a column for each
step. Letters: l layers, e experts, n steps.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moepeft.runs.history import RoutingState, group_sites
from moepeft.runs.router_diagnosis import DEAD_SHARE
from moepeft.runs.router_plots import (
  SHARE_CMAP,
  PanelGrid,
  add_legend,
  plot_lines,
)

# The columns of a panel, in pixels that are seen apart.
_COLUMNS = 150
# Inches of an expert's row, and of a panel at most.
_ROW, _MAX_HEIGHT = 0.035, 4.0
_MIN_HEIGHT = 1.3
# Layers with lines between them, and layers whose numbers are shown.
_MAX_LINES, _MAX_LABELS = 12, 6


def load(states: Sequence[RoutingState], kind: str) -> Figure | None:
  """Heat maps of the shares over steps, and the number of dead experts.

  Args:
    kind: key of `metrics_log.SHARES`; None is returned if no site has it.
  """
  if not states or kind not in states[-1].shares:
    return None
  latest = states[-1].shares[kind]
  grid = group_sites(latest)
  curves = {
    site: [
      (s.step, s.shares[kind][site]) for s in states if site in s.shares[kind]
    ]
    for site in latest
  }
  # 1 / e, or k / e if tokens are sent to k experts.
  even = min(float(np.nanmean(np.nanmean(a, -1))) for a in latest.values())
  largest = max(
    float(np.nanmax(share)) for points in curves.values() for _, share in points
  )
  even = min(max(even, 1e-6), 1 - 1e-6)
  norm = TwoSlopeNorm(even, vmin=0, vmax=max(largest, 1.5 * even))
  rows = max(share.size for share in latest.values())
  height = min(max(_ROW * rows, _MIN_HEIGHT), _MAX_HEIGHT)
  panels = PanelGrid(grid, extra_width=2.9, panel_size=(1.8, height))
  dead = sum(int(dead_experts(share).sum()) for share in latest.values())
  total = sum(int(np.isfinite(share).sum()) for share in latest.values())
  panels.title(
    'Experts over training',
    f'shares; {dead} of {total} are dead after step {states[-1].step:,}',
  )
  for row, (place, sites) in enumerate(grid.items()):
    for column, (name, site) in enumerate(sites):
      axes = panels.panel(row, column, name)
      _plot_shares(axes, curves[site], norm, labeled=column == 0)
    panels.label(row, place, 'layer')
    axes = panels.wide_panel(row, 'dead experts of all layers')
    counts = {
      name: [(step, dead_experts(a).sum()) for step, a in curves[site]]
      for name, site in sites
    }
    plot_lines(axes, counts)
    add_legend(axes)
    axes.set_ylim(
      -0.1, 1.1 * max(1, *(n for c in counts.values() for _, n in c))
    )
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  panels.color_bar(
    ScalarMappable(norm, SHARE_CMAP),
    {0: '0%', even: f'{even:.0%} (even)', norm.vmax: f'{norm.vmax:.0%}'},
  )
  panels.axis_labels('step', 'step')
  return panels.figure


def dead_experts(share: np.ndarray) -> np.ndarray:
  """bool [l, e]: whether a share is at most 1 % of its layer's even one."""
  even = np.nanmean(share, axis=-1, keepdims=True)
  # A layer's only expert has the even share; NaN compares as False.
  return share <= DEAD_SHARE * even


def _plot_shares(
  axes: Axes,
  points: Sequence[tuple[int, np.ndarray]],
  norm: TwoSlopeNorm,
  labeled: bool,
) -> None:
  """Plots shares [l, e] at steps as an image [l e, n]."""
  steps = np.array([step for step, _ in points])
  shares = np.stack([share.reshape(-1) for _, share in points], axis=1)
  layers, experts = points[-1][1].shape
  first, last = steps[0], max(steps[-1], steps[0] + 1)
  # Logs are not evenly spaced where a validation comes in between.
  columns = np.linspace(first, last, _COLUMNS)
  places = np.searchsorted(steps, columns, side='right') - 1
  axes.imshow(
    shares[:, places],
    cmap=SHARE_CMAP,
    norm=norm,
    aspect='auto',
    interpolation='nearest',
    extent=(first, last, layers * experts - 0.5, -0.5),
  )
  if layers <= _MAX_LINES:
    for layer in range(1, layers):
      axes.axhline(layer * experts - 0.5, color='0.3', lw=0.4)
  middles = np.arange(layers) * experts + (experts - 1) / 2
  shown = np.linspace(0, layers - 1, min(layers, _MAX_LABELS)).round()
  shown = shown.astype(int) if labeled else []
  axes.set_yticks(middles[shown], [str(i) for i in shown])
  axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
