# SPDX-License-Identifier: Apache-2.0
"""Saves checkpoints."""

import dataclasses

from moepeft.core import distributed
from moepeft.training.callbacks.callback import Callback, CallbackEntry


class Checkpointing(Callback):
  """Saves every `every_steps` steps, the last step, and on request.

  A checkpoint is written while training continues. A write error ends the run
  at the next step, or at the end.
  """

  def __init__(self, every_steps: int):
    self._every_steps = every_steps

  def on_step(self, loop, batch, metrics):
    loop.checkpoints.check()
    due = loop.is_due(self._every_steps) or loop.save_requested
    if not due and not loop.is_last_step:
      return
    loop.save_requested = False
    # Raises if the state is not finite, before it replaces a good checkpoint.
    loop.flush_metrics()
    with loop.progress.paused('saving'):
      loop.run_progress = dataclasses.replace(
        loop.run_progress,
        place=distributed.gather_positions(loop.batches.position()),
      )
      if loop.workdir:
        loop.workdir.check()
      loop.checkpoints.save(loop.state, loop.identity, loop.run_progress)

  def on_end(self, loop):
    loop.checkpoints.wait()


CHECKPOINTING = CallbackEntry(
  build=lambda config: Checkpointing(config.checkpoint.every_steps),
  enabled_by=('checkpoint.every_steps',),
  order=90,
)
