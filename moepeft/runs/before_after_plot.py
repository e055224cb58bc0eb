# SPDX-License-Identifier: Apache-2.0
"""A figure of a run's evaluations before and after training.

Above, a panel for each figure of the held-out rows (validation loss, margins);
below, the accuracy of each task, hollow before and full after, colored where
the change is more than the noise of its examples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moepeft.runs import before_after

# Okabe and Ito's, which the colour-blind can tell apart.
_ROSE, _FELL, _GREY = '#0072B2', '#D55E00', '0.6'
_LINE, _PANEL = 0.21, 1.9
# The values that a figure can have; others can be any number.
_POSSIBLE = {
  'validation_loss': (0.0, math.inf),
  'validation_accuracies': (0.0, 1.0),
}


def draw(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure | None:
  """The figure; None where nothing was measured both times.

  Args:
    before, after: as `Evaluator` returns them.
  """
  figures = [
    key
    for key in ('validation_loss', *sorted(after.keys() - {'validation_loss'}))
    if key.startswith('validation_') and key in before and key in after
  ]
  olds = {_key(row): row for row in before.get('rows', ())}
  pairs = [
    (olds[_key(row)], row) for row in after.get('rows', ()) if _key(row) in olds
  ]
  if not figures and not pairs:
    return None
  columns = list(dict.fromkeys(row['templates'] for _, row in pairs))
  tasks = list(dict.fromkeys((r['group'], r['task']) for _, r in pairs))
  heights = [2.1] * bool(figures) + [_LINE * len(tasks) + 1.2] * bool(pairs)
  width = max(_PANEL * len(figures), 2 + 2.6 * len(columns), 3.2)
  figure = Figure(figsize=(width, sum(heights)), layout='constrained')
  parts = list(
    figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[
      :, 0
    ]
  )
  if figures:
    # As many as there is room for: one panel is not as wide as all.
    count = max(len(figures), int(width / _PANEL))
    axes = parts.pop(0).subplots(1, count, squeeze=False)[0]
    for panel, key in zip(axes, figures, strict=False):
      _slope(panel, key, before[key], after[key])
    for panel in axes[len(figures) :]:
      panel.remove()
  if pairs:
    _accuracies(parts[0], pairs, tasks, columns)
  return figure


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
  return row['group'], row['task'], row['templates']


def _slope(axes: Axes, key: str, old: float, new: float) -> None:
  axes.plot([0, 1], [old, new], 'o-', color=_ROSE, ms=5)
  axes.set_title(key.replace('_', ' ').replace(' ', '\n', 1), fontsize=9)
  axes.set_xticks([0, 1], ['before', 'after'], fontsize=8)
  texts = before_after.format_pair(old, new)
  # Beside the points, where the line between them does not cross the numbers.
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
  # A change of nearly nothing is drawn as one.
  room = max(0.35 * abs(new - old), 0.05 * max(abs(old), abs(new)), 1e-3)
  least, most = _POSSIBLE.get(key, (-math.inf, math.inf))
  axes.set_ylim(
    max(min(old, new) - room, least), min(max(old, new) + room, most)
  )
  for line in axes.lines:
    line.set_clip_on(False)
  axes.tick_params(axis='y', labelsize=7)
  axes.spines[['top', 'right']].set_visible(False)


def _accuracies(
  figure: Any,
  pairs: Sequence[tuple[Mapping, Mapping]],
  tasks: Sequence[tuple[str, str]],
  columns: Sequence[str],
) -> None:
  """A panel for each kind of template, a line a task."""
  panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
  for axes, column in zip(panels, columns, strict=True):
    for old, new in pairs:
      if new['templates'] != column:
        continue
      y = tasks.index((new['group'], new['task']))
      start, end = 100 * old['accuracy'], 100 * new['accuracy']
      color = _GREY
      if before_after.is_beyond_noise(old, new, len(pairs)):
        color = _ROSE if end > start else _FELL
      axes.plot([start, end], [y, y], color=color, lw=1.6)
      axes.plot(start, y, 'o', color=color, mfc='white', ms=5, clip_on=False)
      axes.plot(end, y, 'o', color=color, ms=5, clip_on=False)
      axes.plot(100 * new['chance'], y, '|', color=_GREY, ms=7)
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
    Line2D([], [], color=_ROSE, lw=1.6, label='rose'),
    Line2D([], [], color=_FELL, lw=1.6, label='fell'),
    Line2D([], [], color=_GREY, lw=1.6, label='within noise'),
    Line2D([], [], color=_GREY, ls='', marker='|', label='chance'),
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
