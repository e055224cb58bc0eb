# SPDX-License-Identifier: Apache-2.0
"""Draws a run's plots during training and at its end."""

from moepeft.core import distributed
from moepeft.runs import plots
from moepeft.training.callbacks.callback import Callback, CallbackEntry


class Plotting(Callback):
  """Draws PNGs at log steps, at most once a minute, and at the end."""

  def on_start(self, loop):
    self._enabled = distributed.first()
    self._plots = plots.Figures(loop.history, loop.run.plots_dir, self._enabled)

  def on_step(self, loop, batch, metrics):
    if loop.metrics.flushed_step == loop.step:
      with loop.progress.paused('drawing'):
        self._plots.refresh()

  def on_end(self, loop):
    self._plots.draw()
    if self._enabled and loop.after:
      plots.draw_before_after(loop.before, loop.after, loop.run.plots_dir)


PLOTTING = CallbackEntry(
  build=lambda config: Plotting(), enabled_by=('log.plots',), order=95
)
