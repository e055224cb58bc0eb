# SPDX-License-Identifier: Apache-2.0
"""A run's figures as PNGs: losses, learning rate, routers, before and after."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
)

from moepeft.runs import before_after_plot, router_plots
from moepeft.runs.history import History

# Okabe and Ito's, which the colour-blind can tell apart.
_BLUE, _ORANGE, _PALE = '#0072B2', '#D55E00', '#56B4E9'
_DPI = 100
# {key of rows.SHARES: name of the figure}; sites of a run may be of two kinds.
_SHARES = {'weight': 'weight', 'tokens': 'tokens', 'load': 'argmax'}
# Between two drawings while a run goes on; one takes a second or two.
_SECONDS = 60
# Times the least that the largest loss has on a linear axis, at most.
_LOG = 2.5


class Figures:
  """The figures of a run that goes on, below a folder."""

  def __init__(self, history: History, folder: str, drawn: bool = True):
    """`drawn`: whether this process draws them."""
    self._history, self._folder, self._drawn = history, folder, drawn
    self._last = time.monotonic()

  def draw(self) -> None:
    if self._drawn:
      draw(self._history, self._folder)
    self._last = time.monotonic()

  def refresh(self) -> None:
    """Draws them where a minute has passed since."""
    if time.monotonic() - self._last > _SECONDS:
      self.draw()


def draw_before_after(
  before: Mapping[str, Any], after: Mapping[str, Any], folder: str
) -> list[str]:
  """Draws before_after.png; [] where nothing was measured both times."""
  figure = before_after_plot.draw(before, after)
  if figure is None:
    return []
  return [_save(figure, os.path.join(folder, 'before_after.png'))]


def draw(rows: Iterable[Mapping[str, Any]], folder: str) -> list[str]:
  """Draws what there is to draw; returns the paths of the PNGs.

  Args:
    rows: as in `moepeft.runs.metrics_log`, or a `History` of them.
    folder: made if need be. A reader sees the old picture or the new.
  """
  history = rows if isinstance(rows, History) else History(rows)
  figures = {
    'loss': _loss(history),
    'learning_rate': _learning_rate(history),
    'preference': _preference(history),
    **{
      f'router_{name}': router_plots.shares(history.routing(), kind)
      for kind, name in _SHARES.items()
    },
    'router_entropy': router_plots.entropy(history.routing()),
  }
  return [
    _save(figure, os.path.join(folder, f'{name}.png'))
    for name, figure in figures.items()
    if figure is not None
  ]


def _save(figure: Figure, path: str) -> str:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  temporary = f'{path}.tmp'
  figure.savefig(temporary, dpi=_DPI, format='png')
  os.replace(temporary, path)
  return path


def _loss(history: History) -> Figure | None:
  """Training loss as it was and smoothed, and validation points."""
  # What validation measures too, whatever is minimised.
  compared = len(history.curve('margins')[0])
  steps, values = history.curve('loss' if compared else 'nll')
  if not len(steps):
    steps, values = history.curve('loss')
  at, validated = history.curve('validation_loss')
  if not len(steps) + len(at):
    return None
  figure, axes = _blank('Loss', 'loss' if compared else 'loss (nats a token)')
  if len(steps):
    axes.plot(steps, values, color=_PALE, lw=0.8, alpha=0.6, label='training')
    axes.plot(steps, smooth(values), color=_BLUE, lw=1.8, label='smoothed')
  if len(at):
    axes.plot(at, validated, 'o-', color=_ORANGE, ms=4, label='validation')
  _scale(axes, values, validated)
  # Above the axes, where no curve can run under it.
  axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=3, frameon=False)
  return figure


def _preference(history: History) -> Figure | None:
  """Accuracy, and rewards of chosen and rejected answers, smoothed."""
  if not len(history.curve('margins')[0]):
    return None
  figure = Figure(figsize=(7, 7), layout='constrained')
  above, below = figure.subplots(2, 1, sharex=True)
  _curves(above, history, {'accuracies': (_BLUE, 'accuracy')})
  above.set(ylim=(0, 1), ylabel='share of pairs')
  _curves(
    below,
    history,
    {
      'rewards_chosen': (_BLUE, 'chosen'),
      'rewards_rejected': (_ORANGE, 'rejected'),
      'margins': (_PALE, 'margin'),
    },
  )
  below.set(xlabel='step', ylabel='reward')
  return figure


def _curves(axes: Axes, history: History, curves: Mapping[str, tuple]) -> None:
  for key, (color, label) in curves.items():
    steps, values = history.curve(key)
    if len(steps):
      axes.plot(steps, smooth(values), color=color, lw=1.8, label=label)
    at, validated = history.curve(f'validation_{key}')
    if len(at):
      validation = f'{label}, validation'
      axes.plot(at, validated, 'o--', color=color, ms=4, label=validation)
  axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=3, frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(alpha=0.3, lw=0.6)


def _learning_rate(history: History) -> Figure | None:
  steps, values = history.curve('learning_rate')
  if not len(steps):
    return None
  figure, axes = _blank('Learning rate', 'learning rate (a step)')
  axes.plot(steps, values, color=_BLUE, lw=1.8)
  axes.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
  axes.set_ylim(bottom=0)
  return figure


def _blank(title: str, label: str) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(7, 4), layout='constrained')
  axes = figure.subplots()
  axes.set_title(title, loc='left')
  axes.set(xlabel='step', ylabel=label)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(alpha=0.3, lw=0.6)
  return figure, axes


def _scale(axes: Axes, values: np.ndarray, validated: np.ndarray) -> None:
  """A scale on which the end of a run is seen as well as its beginning.

  Spikes of a long run, those over the 99.5th percentile, leave the picture.
  Positive values whose largest is over _LOG times the least have a logarithmic
  axis: a fall from 10 to 1 does not flatten the one from 1 to 0.9.
  """
  finite, points = (a[np.isfinite(a)] for a in (values, validated))
  if not len(finite) + len(points):
    return
  high = finite
  if len(finite) >= 200:
    high = [np.percentile(finite, 99.5)]
  low = min([*finite, *points])
  high = max([*high, *points])
  if low > 0 and high > _LOG * low:
    axes.set_yscale('log')
    room = (high / low) ** 0.05
    axes.set_ylim(low / room, high * room)
    # Within a decade and a half three numbers are too few.
    subs = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return
  if len(finite) >= 200:
    room = 0.05 * max(high - low, 1e-9)
    axes.set_ylim(low - room, high + room)


def smooth(values: np.ndarray) -> np.ndarray:
  """A mean under a bell of a fiftieth of the points, which does not lag.

  Where the bell hangs over an end, or over a value that is not finite, its
  weights there are left out.
  """
  width = max(2.0, len(values) / 100)
  reach = np.arange(-np.ceil(3 * width), np.ceil(3 * width) + 1)
  bell = np.exp(-0.5 * (reach / width) ** 2)
  finite = np.isfinite(values)
  # 'same' is of the longer of the two: the padding makes that the values.
  pad = len(reach)
  mean, norm = (
    np.convolve(np.pad(a, pad), bell, mode='same')[pad:-pad]
    for a in (np.where(finite, values, 0.0), finite.astype(float))
  )
  return np.where(norm > 0, mean / np.maximum(norm, 1e-9), np.nan)
