# SPDX-License-Identifier: Apache-2.0
"""Traces some steps with JAX's profiler, for TensorBoard and Perfetto."""

import re

import jax
from ml_collections import ConfigDict

from moepeft.core import distributed
from moepeft.core.ranges import short_repr
from moepeft.training.callbacks.callback import Callback, CallbackEntry


class Profiling(Callback):
  """Writes a trace of the steps from `first` to `last`, both included.

  The trace has an event 'train' with `step_num` for each of them.
  """

  def __init__(self, first: int, last: int):
    self._first, self._last = first, last
    self._is_tracing = False

  def on_start(self, loop):
    self._maybe_start(loop, loop.step + 1)

  def on_step(self, loop, batch, metrics):
    if self._is_tracing and loop.step == self._last:
      self._stop(loop)
    self._maybe_start(loop, loop.step + 1)

  def on_end(self, loop):
    if self._is_tracing:
      self._stop(loop)

  def close(self):
    if self._is_tracing:
      jax.profiler.stop_trace()

  def _maybe_start(self, loop, step: int) -> None:
    """Starts a trace if the next step is the first to trace.

    A run that resumes between `first` and `last` traces the rest.
    """
    is_first = step == max(self._first, loop.first_step + 1)
    if not is_first or step > self._last or not distributed.first():
      return
    # Wait for earlier steps, so that the trace does not contain their work.
    jax.block_until_ready(loop.state)
    jax.profiler.start_trace(loop.run.profile_dir)
    self._is_tracing = True

  def _stop(self, loop) -> None:
    jax.block_until_ready(loop.state)
    jax.profiler.stop_trace()
    self._is_tracing = False
    loop.progress.print_line(
      f'profile of steps {max(self._first, loop.first_step + 1)} to '
      f'{loop.step} in {loop.run.profile_dir}'
    )


def _build(config: ConfigDict) -> Profiling:
  steps = config.profile.steps
  match = re.fullmatch(r'(\d{1,9}):(\d{1,9})', steps)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last <= config.steps:
    raise ValueError(
      'config.profile.steps is FIRST:LAST, as in 5:8, steps from 1 to '
      f'config.steps={config.steps}; got {short_repr(steps)}'
    )
  return Profiling(first, last)


PROFILING = CallbackEntry(build=_build, enabled_by=('profile.steps',), order=99)
