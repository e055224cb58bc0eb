# SPDX-License-Identifier: Apache-2.0
"""Ends a run on SIGTERM or Ctrl-C, once its step is saved."""

import signal

from moepeft.core import distributed
from moepeft.training.callbacks.callback import Callback, CallbackEntry


class SignalHandling(Callback):
  """Turns SIGTERM and the first Ctrl-C into a request to stop.

  A second Ctrl-C ends the process at once. The handlers are installed after the
  first step: its compilation takes minutes, and there is nothing to save.
  """

  is_of_process = True

  def __init__(self):
    self._received: signal.Signals | None = None
    self._previous_handlers = {}

  def on_step(self, loop, batch, metrics):
    if not self._previous_handlers:
      self._previous_handlers = {
        number: signal.signal(number, self._receive)
        for number in (signal.SIGTERM, signal.SIGINT)
      }
    # Processes synchronize at log steps, where they wait for the device anyway.
    is_log_step = loop.metrics.flushed_step == loop.step
    # A signal during the saving of a step takes effect after the next step.
    if distributed.agree(self._received is not None, is_log_step):
      loop.signal = self._received or signal.SIGTERM
      loop.stop_requested = True

  def close(self):
    for number, handler in self._previous_handlers.items():
      signal.signal(number, handler)

  def _receive(self, number: int, frame) -> None:
    del frame
    if self._received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = signal.Signals(number)


SIGNAL_HANDLING = CallbackEntry(
  build=lambda config: SignalHandling(),
  enabled_by=('checkpoint.every_steps',),
  order=80,
)
