# SPDX-License-Identifier: Apache-2.0
"""A figure of a run's evaluations before and after training.

The upper panels show the metrics of held-out rows (validation loss, margins).
The lower ones show the accuracy of each task, hollow before and filled after,
colored if the change exceeds the sampling noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moepeft.runs import before_after

# From the color-blind safe palette of Okabe and Ito.
_ROSE_COLOR, _FELL_COLOR, _GREY_COLOR = '#0072B2', '#D55E00', '0.6'
# In inches.
_TASK_HEIGHT, _PANEL_WIDTH = 0.21, 1.9
# Ranges of bounded metrics.
_RANGES = {
  'validation_loss': (0.0, math.inf),
  'validation_accuracies': (0.0, 1.0),
}


def draw(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure | None:
  """The figure; None if no metric was measured both times.

  Args:
    before, after: as `Evaluator` returns them.
  """
  metrics = [
    key
    for key in ('validation_loss', *sorted(after.keys() - {'validation_loss'}))
    if key.startswith('validation_') and key in before and key in after
  ]
  old_rows = {_key(row): row for row in before.get('rows', ())}
  pairs = [
    (old_rows[_key(row)], row)
    for row in after.get('rows', ())
    if _key(row) in old_rows
  ]
  if not metrics and not pairs:
    return None
  columns = list(dict.fromkeys(row['templates'] for _, row in pairs))
  tasks = list(dict.fromkeys((r['group'], r['task']) for _, r in pairs))
  heights = [2.1] if metrics else []
  if pairs:
    heights.append(_TASK_HEIGHT * len(tasks) + 1.2)
  width = max(_PANEL_WIDTH * len(metrics), 2 + 2.6 * len(columns), 3.2)
  figure = Figure(figsize=(width, sum(heights)), layout='constrained')
  subfigures = list(
    figure.subfigures(len(heights), height_ratios=heights, squeeze=False).flat
  )
  if metrics:
    # Empty columns keep the panels narrow.
    count = max(len(metrics), int(width / _PANEL_WIDTH))
    axes = subfigures.pop(0).subplots(1, count, squeeze=False)[0]
    for panel, key in zip(axes, metrics, strict=False):
      _plot_metric(panel, key, before[key], after[key])
    for panel in axes[len(metrics) :]:
      panel.remove()
  if pairs:
    _plot_accuracies(subfigures[0], pairs, tasks, columns)
  return figure


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
  return row['group'], row['task'], row['templates']


def _plot_metric(axes: Axes, key: str, old: float, new: float) -> None:
  axes.plot([0, 1], [old, new], 'o-', color=_ROSE_COLOR, ms=5)
  axes.set_title(key.replace('_', ' ').replace(' ', '\n', 1), fontsize=9)
  axes.set_xticks([0, 1], ['before', 'after'], fontsize=8)
  texts = before_after.format_pair(old, new)
  # Beside the points, where the line does not cross the numbers.
  for x, value, text, side in zip(
    (0, 1), (old, new), texts, ('right', 'left'), strict=True
  ):
    axes.annotate(
      text,
      (x, value),
      xytext=(12 * x - 6, 1),
      textcoords='offset points',
      ha=side,
      va='bottom',
      fontsize=8,
    )
  axes.set_xlim(-0.95, 1.95)
  # The minimum margin keeps a tiny change small in the plot.
  margin = max(0.35 * abs(new - old), 0.05 * max(abs(old), abs(new)), 1e-3)
  least, most = _RANGES.get(key, (-math.inf, math.inf))
  axes.set_ylim(
    max(min(old, new) - margin, least), min(max(old, new) + margin, most)
  )
  for line in axes.lines:
    line.set_clip_on(False)
  axes.tick_params(axis='y', labelsize=7)
  axes.spines[['top', 'right']].set_visible(False)


def _plot_accuracies(
  figure: Any,
  pairs: Sequence[tuple[Mapping, Mapping]],
  tasks: Sequence[tuple[str, str]],
  columns: Sequence[str],
) -> None:
  """Draws a panel for each kind of template, with one line per task."""
  panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
  for axes, column in zip(panels, columns, strict=True):
    for old, new in pairs:
      if new['templates'] != column:
        continue
      y = tasks.index((new['group'], new['task']))
      start, end = 100 * old['accuracy'], 100 * new['accuracy']
      color = _GREY_COLOR
      if before_after.is_beyond_noise(old, new, len(pairs)):
        color = _ROSE_COLOR if end > start else _FELL_COLOR
      axes.plot([start, end], [y, y], color=color, lw=1.6)
      axes.plot(start, y, 'o', color=color, mfc='white', ms=5, clip_on=False)
      axes.plot(end, y, 'o', color=color, ms=5, clip_on=False)
      axes.plot(100 * new['chance'], y, '|', color=_GREY_COLOR, ms=7)
    title = f'accuracy (%), {column.replace("_", " ")} templates'
    axes.set_title(title if column else 'accuracy (%)', fontsize=9, loc='left')
    axes.set_xlim(0, 100)
    axes.grid(alpha=0.3, lw=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[['top', 'right']].set_visible(False)
  names = [' '.join(filter(None, task)) for task in tasks]
  panels[0].set_yticks(range(len(tasks)), names)
  panels[0].set_ylim(len(tasks) - 0.4, -0.6)
  handles = [
    Line2D([], [], color='0.3', ls='', marker='o', mfc='white', label='before'),
    Line2D([], [], color='0.3', ls='', marker='o', label='after'),
    Line2D([], [], color=_ROSE_COLOR, lw=1.6, label='rose'),
    Line2D([], [], color=_FELL_COLOR, lw=1.6, label='fell'),
    Line2D([], [], color=_GREY_COLOR, lw=1.6, label='within noise'),
    Line2D([], [], color=_GREY_COLOR, ls='', marker='|', label='chance'),
  ]
  figure.legend(
    handles=handles,
    loc='outside lower center',
    ncols=len(handles),
    frameon=False,
    fontsize=7,
    handletextpad=0.3,
    columnspacing=1.0,
  )
