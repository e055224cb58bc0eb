# SPDX-License-Identifier: Apache-2.0
"""PNG files of collected routing: heat maps by task, language, and expert."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from moepeft.evaluation.routing.site_routing import (
  CollectedRouting,
  SiteRouting,
)
from moepeft.runs import router_load_plot, router_plots
from moepeft.runs.history import History, group_sites
from moepeft.runs.plots import SHARE_NAMES, save

# Inches: of a cell, and of a panel.
_CELL, _LEAST_PANEL = 0.18, 0.8
# Inches of a figure: a title, a subtitle and a color bar side by side.
_MIN_WIDTH = 7.2


def draw(
  routing: CollectedRouting,
  similarity: Mapping[str, np.ndarray | None],
  history: History,
  folder: str,
) -> list[str]:
  """Draws all plots that there are data for; returns the PNGs' paths.

  Args:
    similarity: path of a site -> cosines [l, e, e].
    history: of the run's metrics.
  """
  figures: dict[str, Figure | None] = {'experts': experts(routing.sites)}
  by_path = {site.path: site for site in routing.sites}
  for block, members in group_sites(by_path).items():
    sites = {name: by_path[path] for name, path in members}
    name = block.replace('/', '_')
    figures[f'expert_by_task_{name}'] = by_group(
      f'Experts by task: {block}',
      sites,
      routing.tasks,
      {label: site.by_task for label, site in sites.items()},
    )
    if routing.languages:
      figures[f'expert_by_language_{name}'] = by_group(
        f'Experts by language: {block}',
        sites,
        routing.languages,
        {label: site.by_language for label, site in sites.items()},
      )
    cosines = {name: similarity.get(site.path) for name, site in sites.items()}
    if all(values is not None for values in cosines.values()):
      figures[f'expert_similarity_{name}'] = square(
        f'Similarity of experts: {block}',
        'cosine of the changes of the weights',
        {label: (values, ()) for label, values in cosines.items()},
        'expert',
      )
  for overlap in routing.overlap:
    names = [by_path[path].name for path in overlap.paths]
    stack = names[0].split('/')[0]
    reads = by_path[overlap.paths[0]].reads
    layers = len(overlap.values)
    if len(names) > 1:
      figures[f'site_overlap_{stack}_{reads}_{layers}'] = square(
        f'Overlap between sites: {stack}, {reads}',
        'linear CKA of the shares; 1 for the same routing of the tokens',
        {'': (overlap.values, names)},
        '',
        vmin=0,
      )
  states = history.routing()
  for kind, name in SHARE_NAMES.items():
    figures[f'router_{name}'] = router_plots.shares(states, kind)
    figures[f'router_{name}_steps'] = router_load_plot.load(states, kind)
  figures['router_entropy'] = router_plots.entropy(states)
  return [
    save(figure, os.path.join(folder, f'{name}.png'))
    for name, figure in figures.items()
    if figure is not None
  ]


def by_group(
  title: str,
  sites: Mapping[str, SiteRouting],
  groups: Sequence[str],
  shares: Mapping[str, np.ndarray],
) -> Figure:
  """A panel [g, e] of the sites of a block in each of its layers.

  Args:
    sites: {name of a projection: site}.
    shares: {name of a projection: [g, l, e]}.
  """
  layers = max(len(site.counts) for site in sites.values())
  size = max(array.shape[-1] for array in shares.values())
  norm = _norm(sites.values(), shares.values())
  grid = {
    f'layer {layer}': [(name, site.path) for name, site in sites.items()]
    for layer in range(layers)
  }
  panels = router_plots.PanelGrid(
    grid,
    panel_size=(
      max(_CELL * size, _LEAST_PANEL),
      max(_CELL * len(groups), _LEAST_PANEL),
    ),
    left=router_plots.left_margin(groups),
    min_width=_MIN_WIDTH,
  )
  panels.title(title, 'mean share of the weight of its tokens')
  for layer, row in enumerate(grid):
    for column, name in enumerate(sites):
      axes = panels.panel(layer, column, name if layer == 0 else '')
      axes.imshow(
        shares[name][:, layer],
        cmap=router_plots.SHARE_CMAP,
        norm=norm,
        aspect='auto',
        interpolation='nearest',
      )
      axes.set_xticks(router_plots.end_ticks(shares[name].shape[-1]))
      labels = groups if column == 0 else []
      axes.set_yticks(range(len(labels)), labels)
    panels.label(layer, row, '')
  _color_bar(panels, norm)
  panels.axis_labels('expert', '')
  return panels.figure


def experts(sites: Sequence[SiteRouting]) -> Figure:
  """A panel [l, e] of each site, with a cross on dead experts."""
  by_path = {site.path: site for site in sites}
  grid = group_sites(by_path)
  norm = _norm(sites, [site.share for site in sites])
  panels = router_plots.PanelGrid(grid)
  dead = int(sum(site.dead.sum() for site in sites))
  total = sum(sum(site.counts) for site in sites)
  panels.title(
    'Experts of all sites',
    f'mean share of the weight; {dead} of {total} are dead (crosses)',
  )
  for row, (block, members) in enumerate(grid.items()):
    for column, (name, path) in enumerate(members):
      site = by_path[path]
      axes = panels.panel(row, column, name)
      axes.imshow(
        site.share,
        cmap=router_plots.SHARE_CMAP,
        norm=norm,
        aspect='auto',
        interpolation='nearest',
      )
      layers, numbers = np.nonzero(site.dead)
      # Yellow, on the darkest blue.
      axes.plot(numbers, layers, 'x', color='#F0E442', ms=4, mew=1)
      axes.set_xticks(router_plots.end_ticks(site.share.shape[1]))
      axes.set_yticks(router_plots.end_ticks(len(site.counts)))
    panels.label(row, block, 'layer')
  _color_bar(panels, norm)
  panels.axis_labels('expert', '')
  return panels.figure


def square(
  title: str,
  subtitle: str,
  values: Mapping[str, tuple[np.ndarray, Sequence[str]]],
  unit: str,
  vmin: float = -1,
) -> Figure:
  """A square panel of each column in each layer.

  Args:
    values: {column: (values [l, n, n], names of their rows)}.
    unit: the label of the horizontal axis.
    vmin: the smallest value of the colors; the largest is 1.
  """
  layers = max(len(array) for array, _ in values.values())
  size = max(array.shape[1] for array, _ in values.values())
  names = max((names for _, names in values.values()), key=len)
  side = max(_CELL * size, _LEAST_PANEL)
  # From -1 on, white is 0; from 0 on, white is the least.
  norm = Normalize(vmin, 1)
  cmap = router_plots.SHARE_CMAP if vmin < 0 else 'Reds'
  grid = {
    f'layer {layer}': [(name, name) for name in values]
    for layer in range(layers)
  }
  panels = router_plots.PanelGrid(
    grid,
    panel_size=(side, side),
    left=router_plots.left_margin(names),
    min_width=_MIN_WIDTH,
  )
  panels.title(title, subtitle)
  for layer, row in enumerate(grid):
    for column, (name, (array, labels)) in enumerate(values.items()):
      axes = panels.panel(layer, column, name if layer == 0 else '')
      axes.imshow(
        array[layer],
        cmap=cmap,
        norm=norm,
        aspect='auto',
        interpolation='nearest',
      )
      ticks = range(size) if labels else router_plots.end_ticks(size)
      axes.set_yticks(ticks, labels or ticks)
      axes.set_xticks([] if labels else ticks)
    panels.label(layer, row, '')
  panels.color_bar(
    ScalarMappable(norm, cmap), {value: f'{value:g}' for value in (vmin, 0, 1)}
  )
  panels.axis_labels(unit, '')
  return panels.figure


def _norm(sites, arrays) -> TwoSlopeNorm:
  """Blue below the even share, red above it, up to the largest share."""
  even = min(float(site.even.min()) for site in sites)
  largest = max(
    (float(np.nanmax(a)) for a in arrays if not np.isnan(a).all()),
    default=0.0,
  )
  return TwoSlopeNorm(even, vmin=0, vmax=min(max(largest, 1.5 * even), 1.01))


def _color_bar(panels: router_plots.PanelGrid, norm: TwoSlopeNorm) -> None:
  panels.color_bar(
    ScalarMappable(norm, router_plots.SHARE_CMAP),
    {
      0: '0',
      norm.vcenter: f'{norm.vcenter:.0%} (even)',
      norm.vmax: f'{min(norm.vmax, 1):.0%}',
    },
  )
