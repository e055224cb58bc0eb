# SPDX-License-Identifier: Apache-2.0
"""What a user sees of an agent at a terminal, and asks it there."""

import sys
from collections.abc import Iterator
from typing import TextIO

from moepeft.agent import events
from moepeft.agent.agent import Agent
from moepeft.agent.events import Event, Outcome

_WIDE = 100


class Screen:
  """Prints events: the model's text to `out`, what it does to `aside`.

  Without `stream` only the answer is printed, once it is there.
  """

  def __init__(self, out: TextIO, aside: TextIO, stream: bool):
    """Prints nothing yet."""
    self._out, self._aside, self._stream = out, aside, stream
    self._open = False

  def __call__(self, event: Event) -> None:
    match event:
      case events.Piece(text) if self._stream:
        print(text, end='', file=self._out, flush=True)
        self._open = not text.endswith('\n')
      case events.Called(calls):
        for call in calls:
          self._note(f'-> {call.name} {call.arguments}')
      case events.Returned(result):
        mark = '<- error:' if result.failed else '<-'
        self._note(f'{mark} {result.text}')
      case events.Ended(outcome):
        self._end(outcome)

  def end_line(self) -> None:
    """Whatever comes next begins a line."""
    if self._open:
      print(file=self._out, flush=True)
      self._open = False

  def _note(self, text: str) -> None:
    self.end_line()
    text = ' '.join(text.split())
    text = text if len(text) <= _WIDE else f'{text[: _WIDE - 3]}...'
    print(text, file=self._aside, flush=True)

  def _end(self, outcome: Outcome) -> None:
    if not self._stream and outcome.text:
      print(outcome.text, file=self._out, flush=True)
    self.end_line()
    if outcome.state != events.ANSWERED:
      print(f'[{outcome.state}] {outcome.why}', file=self._aside, flush=True)


def lines(prompt: str = '> ') -> Iterator[str]:
  """Lines of the terminal until its end; Ctrl-C there begins a new one."""
  try:
    # Gives input() a history and keys to edit with.
    import readline  # noqa: F401
  except ImportError:
    pass
  asked = sys.stdin.isatty()
  while True:
    try:
      line = input(prompt if asked else '')
    except EOFError:
      return
    except KeyboardInterrupt:
      print(file=sys.stderr)
      continue
    if line.strip():
      yield line


def converse(agent: Agent, screen: Screen, questions: Iterator[str]) -> None:
  """Asks one question after the other; Ctrl-C ends an answer, not all."""
  for question in questions:
    try:
      agent.ask(question)
    except KeyboardInterrupt:
      screen.end_line()
      print('(interrupted)', file=sys.stderr)
