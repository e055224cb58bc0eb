# SPDX-License-Identifier: Apache-2.0
"""Draws a run's plots during training and at its end."""

from moepeft.core import distributed
from moepeft.runs import plots
from moepeft.training.callbacks.callback import Callback, CallbackEntry


class Plotting(Callback):
  """Draws PNGs every so many steps or once a minute, and at the end."""

  def __init__(self, every_steps: int):
    """
    Args:
      every_steps: steps between drawings; 0 for log steps, at most once a
        minute.
    """
    self._every_steps = every_steps

  def on_start(self, loop):
    self._enabled = distributed.first()
    self._plots = plots.Figures(loop.history, loop.run.plots_dir, self._enabled)

  def on_step(self, loop, batch, metrics):
    if loop.is_due(self._every_steps):
      loop.flush_metrics()
    elif self._every_steps or loop.metrics.flushed_step != loop.step:
      return
    elif not self._plots.due:
      return
    with loop.progress.paused('drawing'):
      self._plots.draw()

  def on_end(self, loop):
    self._plots.draw()
    if self._enabled and loop.after:
      plots.draw_before_after(loop.before, loop.after, loop.run.plots_dir)


PLOTTING = CallbackEntry(
  build=lambda config: Plotting(config.log.plots_every_steps),
  enabled_by=('log.plots',),
  order=95,
)
