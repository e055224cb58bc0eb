# SPDX-License-Identifier: Apache-2.0
"""What an agent tells while it works: for a user's eyes, and for traces."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepeft.agent.calls import Result
from moepeft.agent.model import Call, Reply

# How an answer ends. ANSWERED alone is an answer that the model stands by.
ANSWERED, UNSURE, CUT, BUDGET, LOOP, MALFORMED, FAILED = (
  'answered',
  'unsure',
  'cut',
  'budget',
  'loop',
  'malformed',
  'failed',
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a question.

  Attributes:
    state: ANSWERED; UNSURE (its own check objects), CUT (the server ended it
      at its length), BUDGET, LOOP (the same calls again and again), MALFORMED
      (text that is not in the protocol) or FAILED (no reply).
    text: the answer, or what there was of one.
    why: a sentence where it is not ANSWERED.
    steps, calls, tokens, seconds: that were used.
    estimated: whether `tokens` is in part a guess.
  """

  state: str
  text: str
  why: str
  steps: int
  calls: int
  tokens: int
  estimated: bool
  seconds: float


@dataclasses.dataclass(frozen=True)
class Started:
  """A question.

  Attributes:
    settings: what a replay needs to know of the agent.
    earlier: units of conversation that its memory held.
  """

  question: str
  settings: Mapping[str, Any]
  earlier: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request to the model, `seconds` after the question."""

  request: Mapping[str, Any]
  seconds: float


@dataclasses.dataclass(frozen=True)
class Piece:
  """A piece of the model's text, as it comes."""

  text: str


@dataclasses.dataclass(frozen=True)
class Replied:
  """The model's reply, or why there is none; `late` for want of time."""

  reply: Reply | None
  error: str = ''
  late: bool = False


@dataclasses.dataclass(frozen=True)
class Called:
  """Tools that are about to run, at once."""

  calls: Sequence[Call]


@dataclasses.dataclass(frozen=True)
class Returned:
  """A tool's result."""

  result: Result


@dataclasses.dataclass(frozen=True)
class Counted:
  """The tokens of a message, by a digest of its text."""

  digest: str
  tokens: int


@dataclasses.dataclass(frozen=True)
class Forgotten:
  """Messages that memory lost, and the summary in their place."""

  messages: Sequence[Mapping[str, Any]]
  summary: str


@dataclasses.dataclass(frozen=True)
class Ended:
  """The last event of a question."""

  outcome: Outcome


Event = (
  Started
  | Asked
  | Piece
  | Replied
  | Called
  | Returned
  | Counted
  | Forgotten
  | Ended
)
Tell = Callable[[Event], None]


def ignore(event: Event) -> None:
  """Tells nobody."""
  del event


def both(*listeners: Tell) -> Tell:
  """Tells all of them, in order."""

  def tell(event: Event) -> None:
    for listener in listeners:
      listener(event)

  return tell
