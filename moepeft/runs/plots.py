# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: losses, learning rate, routers, before and after training."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  MaxNLocator,
  NullFormatter,
)

from moepeft.runs import before_after_plot, router_load_plot, router_plots
from moepeft.runs.history import History

# From the color-blind safe palette of Okabe and Ito.
_BLUE, _ORANGE, _PALE = '#0072B2', '#D55E00', '#56B4E9'
_DPI = 100
# Fonts with the characters of names of tasks that matplotlib's own font lacks.
_CHINESE_FONTS = (
  'Noto Sans CJK SC',
  'Noto Sans CJK JP',
  'WenQuanYi Zen Hei',
  'WenQuanYi Micro Hei',
  'Microsoft YaHei',
  'PingFang SC',
  'SimHei',
  'Arial Unicode MS',
)
# Key of `metrics_log.SHARES` -> name in the plot's file name.
SHARE_NAMES = {'weight': 'weight', 'tokens': 'tokens', 'load': 'argmax'}
# Seconds between updates during a run; drawing takes a second or two.
_UPDATE_SECONDS = 60
# The largest share of a run's time that these updates take.
_UPDATE_SHARE = 0.02
# With a larger ratio of the largest to the smallest loss, the axis is
# logarithmic.
_LOG_SCALE_RATIO = 2.5


class Figures:
  """Draws the plots of a run during training into a folder."""

  def __init__(self, history: History, folder: str, enabled: bool = True):
    """`enabled`: whether this process draws plots."""
    self._history, self._folder, self._enabled = history, folder, enabled
    self._last, self._seconds = time.monotonic(), 0.0

  def draw(self) -> None:
    start = time.monotonic()
    if self._enabled:
      draw(self._history, self._folder)
    self._last = time.monotonic()
    self._seconds = self._last - start

  @property
  def due(self) -> bool:
    """Whether a minute has passed since the last drawing, or more if it took
    more than its share of the time."""
    pause = max(_UPDATE_SECONDS, self._seconds / _UPDATE_SHARE)
    return time.monotonic() - self._last > pause


def draw_before_after(
  before: Mapping[str, Any], after: Mapping[str, Any], folder: str
) -> list[str]:
  """Draws before_after.png; [] if no metric was measured both times."""
  figure = before_after_plot.draw(before, after)
  if figure is None:
    return []
  return [save(figure, os.path.join(folder, 'before_after.png'))]


def draw(rows: Iterable[Mapping[str, Any]], folder: str) -> list[str]:
  """Draws the plots that the rows have data for; returns the PNGs' paths.

  Args:
    rows: rows of `moepeft.runs.metrics_log`, or a `History` of them.
    folder: created if needed. Files are replaced atomically.
  """
  history = rows if isinstance(rows, History) else History(rows)
  figures = {
    'loss': _loss(history),
    'learning_rate': _learning_rate(history),
    'preference': _preference(history),
    **{
      f'router_{name}': router_plots.shares(history.routing(), kind)
      for kind, name in SHARE_NAMES.items()
    },
    **{
      f'router_{name}_steps': router_load_plot.load(history.routing(), kind)
      for kind, name in SHARE_NAMES.items()
    },
    'router_entropy': router_plots.entropy(history.routing()),
  }
  return [
    save(figure, os.path.join(folder, f'{name}.png'))
    for name, figure in figures.items()
    if figure is not None
  ]


def save(figure: Figure, path: str) -> str:
  """Writes a PNG, and replaces an older one atomically."""
  names = font_manager.get_font_names()
  families = ['sans-serif', *(f for f in _CHINESE_FONTS if f in names)]
  for text in figure.findobj(Text):
    if not text.get_text().isascii():
      text.set_fontfamily(families)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  temporary = f'{path}.tmp'
  figure.savefig(temporary, dpi=_DPI, format='png')
  os.replace(temporary, path)
  return path


def _loss(history: History) -> Figure | None:
  """The training loss, raw and smoothed, and the validation loss."""
  # Validation measures 'nll' unless the objective compares answers.
  is_preference = len(history.curve('margins')[0])
  steps, values = history.curve('loss' if is_preference else 'nll')
  if not len(steps):
    steps, values = history.curve('loss')
  validation_steps, validation_values = history.curve('validation_loss')
  if not len(steps) + len(validation_steps):
    return None
  figure, axes = _make_axes(
    'Loss', 'loss' if is_preference else 'loss (nats a token)'
  )
  if len(steps):
    axes.plot(steps, values, color=_PALE, lw=0.8, alpha=0.6, label='training')
    axes.plot(steps, smooth(values), color=_BLUE, lw=1.8, label='smoothed')
  if len(validation_steps):
    axes.plot(
      validation_steps,
      validation_values,
      'o-',
      color=_ORANGE,
      ms=4,
      label='validation',
    )
  _set_scale(axes, values, validation_values)
  # Above the axes, where it covers no curve.
  axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=3, frameon=False)
  return figure


def _preference(history: History) -> Figure | None:
  """Accuracy, and rewards of chosen and rejected answers, smoothed."""
  if not len(history.curve('margins')[0]):
    return None
  figure = Figure(figsize=(7, 7), layout='constrained')
  accuracy_axes, reward_axes = figure.subplots(2, 1, sharex=True)
  _plot_curves(accuracy_axes, history, {'accuracies': (_BLUE, 'accuracy')})
  accuracy_axes.set(ylim=(0, 1), ylabel='share of pairs')
  _plot_curves(
    reward_axes,
    history,
    {
      'rewards_chosen': (_BLUE, 'chosen'),
      'rewards_rejected': (_ORANGE, 'rejected'),
      'margins': (_PALE, 'margin'),
    },
  )
  reward_axes.set(xlabel='step', ylabel='reward')
  return figure


def _plot_curves(
  axes: Axes, history: History, curves: Mapping[str, tuple]
) -> None:
  for key, (color, label) in curves.items():
    steps, values = history.curve(key)
    if len(steps):
      axes.plot(steps, smooth(values), color=color, lw=1.8, label=label)
    steps, values = history.curve(f'validation_{key}')
    if len(steps):
      validation = f'{label}, validation'
      axes.plot(steps, values, 'o--', color=color, ms=4, label=validation)
  axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=3, frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(alpha=0.3, lw=0.6)


def _learning_rate(history: History) -> Figure | None:
  steps, values = history.curve('learning_rate')
  if not len(steps):
    return None
  figure, axes = _make_axes('Learning rate', 'learning rate (a step)')
  axes.plot(steps, values, color=_BLUE, lw=1.8)
  axes.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
  axes.set_ylim(bottom=0)
  return figure


def _make_axes(title: str, label: str) -> tuple[Figure, Axes]:
  figure = Figure(figsize=(7, 4), layout='constrained')
  axes = figure.subplots()
  axes.set_title(title, loc='left')
  axes.set(xlabel='step', ylabel=label)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(alpha=0.3, lw=0.6)
  return figure, axes


def _set_scale(
  axes: Axes, values: np.ndarray, validation_values: np.ndarray
) -> None:
  """Sets the scale of a loss so that its late changes are visible, too.

  Spikes of a long run above the 99.5th percentile are cut off. The axis of
  positive losses is logarithmic if their ratio exceeds _LOG_SCALE_RATIO, so
  that a fall from 10 to 1 does not flatten one from 1 to 0.9.
  """
  finite, points = (a[np.isfinite(a)] for a in (values, validation_values))
  if not len(finite) + len(points):
    return
  high = finite
  if len(finite) >= 200:
    high = [np.percentile(finite, 99.5)]
  low = min([*finite, *points])
  high = max([*high, *points])
  if low > 0 and high > _LOG_SCALE_RATIO * low:
    axes.set_yscale('log')
    margin = (high / low) ** 0.05
    axes.set_ylim(low / margin, high * margin)
    # Ticks at 1, 2 and 5 are too few for less than a decade and a half.
    subs = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return
  if len(finite) >= 200:
    margin = 0.05 * max(high - low, 1e-9)
    axes.set_ylim(low - margin, high + margin)


def smooth(values: np.ndarray) -> np.ndarray:
  """Smooths values with a Gaussian window, a hundredth of the points wide.

  Weights beyond the ends and on non-finite values are zero.
  """
  width = max(2.0, len(values) / 100)
  offsets = np.arange(-np.ceil(3 * width), np.ceil(3 * width) + 1)
  kernel = np.exp(-0.5 * (offsets / width) ** 2)
  finite = np.isfinite(values)
  # mode='same' returns the longer length, so the values are padded.
  pad = len(offsets)
  mean, norm = (
    np.convolve(np.pad(a, pad), kernel, mode='same')[pad:-pad]
    for a in (np.where(finite, values, 0.0), finite.astype(float))
  )
  return np.where(norm > 0, mean / np.maximum(norm, 1e-9), np.nan)
