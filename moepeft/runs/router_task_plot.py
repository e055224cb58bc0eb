# SPDX-License-Identifier: Apache-2.0
"""Plot of the experts by task, all layers of a site in one panel.

A panel has a row for each task, and a column for each expert of each layer.
Letters: g tasks, l layers, e experts.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moepeft.runs.history import group_sites
from moepeft.runs.router_plots import SHARE_CMAP, PanelGrid, left_margin

# Inches: of a task's row, and of an expert's column.
_ROW, _COLUMN = 0.12, 0.06
_MIN_WIDTH, _MAX_WIDTH, _MIN_HEIGHT = 1.3, 3.2, 0.8
# Layers with lines between them, and layers whose numbers are shown.
_MAX_LINES, _MAX_LABELS = 12, 8


def by_task(
  shares: Mapping[str, np.ndarray], tasks: Sequence[str], step: int
) -> Figure:
  """Heat maps of the experts' shares in the tokens of each task.

  Args:
    shares: {site: [g, l, e]}, with the sum 1 over a layer's experts; NaN where
      a layer has fewer experts or a task no tokens.
    tasks: their names.
    step: of the training run.
  """
  grid = group_sites(shares)
  # Of the layer with the most experts.
  even = 1 / max(int(np.isfinite(a).sum(-1).max()) for a in shares.values())
  largest = max(float(np.nanmax(share)) for share in shares.values())
  norm = TwoSlopeNorm(even, vmin=0, vmax=max(largest, 1.5 * even))
  columns = max(share[0].size for share in shares.values())
  panels = PanelGrid(
    grid,
    panel_size=(
      min(max(_COLUMN * columns, _MIN_WIDTH), _MAX_WIDTH),
      max(_ROW * len(tasks), _MIN_HEIGHT),
    ),
    left=left_margin(tasks),
    # For the title and the color bar side by side.
    min_width=6.4,
  )
  panels.title(
    f'Experts by task after step {step:,}',
    "mean share; a layer's experts are side by side",
  )
  for row, (block, sites) in enumerate(grid.items()):
    for column, (name, site) in enumerate(sites):
      axes = panels.panel(row, column, name)
      _plot_shares(axes, shares[site], norm)
      labels = tasks if column == 0 else []
      axes.set_yticks(range(len(labels)), labels)
    panels.label(row, block, '')
  panels.color_bar(
    ScalarMappable(norm, SHARE_CMAP),
    {0: '0%', even: f'{even:.0%} (even)', norm.vmax: f'{norm.vmax:.0%}'},
  )
  panels.axis_labels('layer', '')
  return panels.figure


def _plot_shares(axes: Axes, shares: np.ndarray, norm: TwoSlopeNorm) -> None:
  """Plots shares [g, l, e] as an image [g, l e]."""
  tasks, layers, experts = shares.shape
  axes.imshow(
    shares.reshape(tasks, -1),
    cmap=SHARE_CMAP,
    norm=norm,
    aspect='auto',
    interpolation='nearest',
  )
  if layers <= _MAX_LINES:
    for layer in range(1, layers):
      axes.axvline(layer * experts - 0.5, color='0.3', lw=0.4)
  # Behind NaN, apart from the white of even shares.
  axes.set_facecolor('0.8')
  shown = range(0, layers, -(-layers // _MAX_LABELS))
  middles = [layer * experts + (experts - 1) / 2 for layer in shown]
  axes.set_xticks(middles, [str(layer) for layer in shown])
