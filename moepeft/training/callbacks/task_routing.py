# SPDX-License-Identifier: Apache-2.0
"""Draws the experts by task every so many steps, and at the end."""

import os

from moepeft.core import distributed
from moepeft.runs import plots, router_task_plot
from moepeft.training.callbacks.callback import Callback, CallbackEntry


class TaskRoutingPlot(Callback):
  """Draws expert_by_task.png if the run has routers and several tasks."""

  def __init__(self, every_steps: int):
    """`every_steps`: steps between drawings."""
    self._every_steps = every_steps
    self._drawn_step = -1

  def on_step(self, loop, batch, metrics):
    if loop.task_routing and loop.is_due(self._every_steps):
      with loop.progress.paused('drawing'):
        self._draw(loop)

  def on_end(self, loop):
    if loop.task_routing and self._drawn_step != loop.step and not loop.signal:
      self._draw(loop)

  def _draw(self, loop):
    # All processes compute it; the first one draws.
    shares = loop.task_routing(loop.variables)
    self._drawn_step = loop.step
    if distributed.first():
      figure = router_task_plot.by_task(
        shares, loop.task_routing.tasks, loop.step
      )
      plots.save(figure, os.path.join(loop.run.plots_dir, 'expert_by_task.png'))


TASK_ROUTING = CallbackEntry(
  build=lambda config: TaskRoutingPlot(config.log.plots_every_steps),
  enabled_by=('log.plots_every_steps',),
  order=96,
)
