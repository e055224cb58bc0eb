# SPDX-License-Identifier: Apache-2.0
"""Writes the metrics of steps to the trackers and moves the progress bar."""

from moepeft.training.callbacks.callback import Callback, CallbackEntry


class MetricsLogging(Callback):
  """Logs every `every_steps` steps."""

  def __init__(self, every_steps: int):
    self._every_steps = every_steps

  def on_step(self, loop, batch, metrics):
    loop.metrics.add(loop.step, batch, metrics)
    if loop.step == loop.first_step + 1:
      # The speed excludes the first step, which includes compilation.
      loop.progress.begin(loop.step)
    loop.progress.step(loop.step)
    if loop.is_due(self._every_steps):
      loop.flush_metrics()


METRICS_LOGGING = CallbackEntry(
  build=lambda config: MetricsLogging(config.log.every_steps),
  enabled_by=('log.every_steps',),
  order=10,
)
