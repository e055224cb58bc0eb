# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run before its last step, once it is saved."""

import signal


class Signals:
  """Turns SIGTERM and the first Ctrl-C into a request, within a `with`.

  From `listen` on, the loop asks `received` after each step, saves and leaves;
  a second Ctrl-C ends the process at once. Before, signals do what they did:
  while the first step is compiled, which takes minutes, there is nothing to
  save.
  """

  def __init__(self):
    self.received: signal.Signals | None = None
    self._before = {}

  def __enter__(self) -> 'Signals':
    return self

  def listen(self) -> None:
    if not self._before:
      self._before = {
        s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)
      }

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame) -> None:
    del frame
    if self.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = signal.Signals(number)


class Stopped(Exception):
  """A run that a signal ended, after it was saved.

  Attributes:
    code: the exit code that shells expect, 128 and the signal's number.
  """

  def __init__(self, received: signal.Signals, step: int, path: str):
    super().__init__(
      f'stopped by {received.name} after step {step}, which is saved in '
      f'{path}; the same command goes on from there'
    )
    self.code = 128 + received
