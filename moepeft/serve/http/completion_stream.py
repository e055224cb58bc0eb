# SPDX-License-Identifier: Apache-2.0
"""An answer's tokens as text while they come, cut at stop strings."""

import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence

from moepeft.inference.api import (
  CANCELLED,
  FAILED,
  LENGTH,
  STOP,
  TIME,
  Event,
  Finished,
  PromptLogprobs,
  Token,
  TokenLogprob,
)
from moepeft.inference.detokenizer import (
  Detokenizer,
  SpecialTokenMarkers,
  StopStrings,
)
from moepeft.serve.http.errors import Problem, broken, later, wrong
from moepeft.serve.http.event_bridge import Underway
from moepeft.serve.http.request_stats import Tally
from moepeft.serve.http.text import Words

_LOG = logging.getLogger('moepeft.serve')
# Why an answer ended, in OpenAI's words, which has none for a time that is up.
REASONS = {
  STOP: 'stop',
  LENGTH: 'length',
  TIME: 'length',
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A token of an answer, and where its text begins.

  Attributes:
    end: whether it ends the answer and is no text.
  """

  scored: TokenLogprob
  offset: int
  end: bool = False


@dataclasses.dataclass(frozen=True)
class Delta:
  """What is new of an answer.

  Attributes:
    text: never half a character, and nothing of a stop string.
    entries: tokens whose text is out by now.
    prompt: its tokens, where they were asked for.
    reason: why it ended, of `protocol`; '' while it goes on.
  """

  text: str = ''
  entries: tuple[Entry, ...] = ()
  prompt: tuple[TokenLogprob, ...] = ()
  reason: str = ''

  def __add__(self, other: 'Delta') -> 'Delta':
    return Delta(
      self.text + other.text,
      self.entries + other.entries,
      self.prompt + other.prompt,
      self.reason or other.reason,
    )


class Answer:
  """One answer.

  Attributes:
    tokens: that have come; those of a stop string are among them.
    stopped: whether a stop string was met.
  """

  def __init__(
    self,
    words: Words,
    ends: Sequence[int],
    stops: Sequence[str] = (),
    before: Sequence[int] = (),
  ):
    """
    Args:
      ends: ids that end it and are no text.
      before: ids whose text the answer's is joined to, as a space may be at
        the joint.
    """
    self._detokenizer = Detokenizer(words.decode)
    self._markers = SpecialTokenMarkers(words.hidden, stops)
    self._stops = StopStrings(self._markers.stops)
    self._detokenizer.feed(before)
    self._ends = frozenset(ends)
    self._held: list[Entry] = []
    # Characters that tokens came to, and of these, those that were given out.
    self._read = self._said = 0
    self.tokens, self.stopped = 0, False

  def feed(self, token: TokenLogprob) -> Delta:
    if self.stopped:
      return Delta()
    self.tokens += 1
    end = token.id in self._ends
    self._held.append(Entry(token, self._read, end))
    if end:
      return Delta()
    delta = self._given(self._detokenizer.feed([token.id]))
    marker = self._markers.of.get(token.id)
    if marker and not self.stopped:
      delta += self._given(marker)
    return delta

  def finish(self, reason: str) -> Delta:
    """What was held back, and why no more comes."""
    if self.stopped:
      return Delta(reason=STOP)
    last = self._given(self._detokenizer.finish())
    if not self.stopped:
      rest = self._markers.removed(self._stops.finish())
      last += Delta(rest, tuple(self._held))
    return last + Delta(reason=STOP if self.stopped else reason)

  def _given(self, text: str) -> Delta:
    self._read += len(self._markers.removed(text))
    out = self._markers.removed(self._stops.feed(text))
    self._said += len(out)
    self.stopped = self._stops.found
    # A token whose text may become a stop string waits with it.
    count = sum(entry.offset < self._said for entry in self._held)
    entries, self._held = self._held[:count], self._held[count:]
    return Delta(out, tuple(entries))


async def deltas(
  underway: Underway, answers: Sequence[Answer], tally: Tally
) -> AsyncIterator[list[tuple[int, Delta]]]:
  """What is new of several answers at once, each at most once a time.

  Raises:
    Problem: one of them failed, or got no token in its time.
  """
  async for batch in underway.batches():
    found: dict[int, Delta] = {}
    for index, event in batch:
      try:
        new = _delta(answers[index], event, tally, underway.trouble(index))
      except Problem:
        # What came before it is given out first.
        yield list(found.items())
        raise
      if answers[index].stopped:
        underway.end(index)
      found[index] = found.get(index, Delta()) + new
    yield list(found.items())


def _delta(answer: Answer, event: Event, tally: Tally, trouble: str) -> Delta:
  if isinstance(event, PromptLogprobs):
    return Delta(prompt=event.tokens)
  if isinstance(event, Token):
    # What comes after a stop string is nobody's.
    tally.tokens(not answer.stopped)
    return answer.feed(event.token)
  assert isinstance(event, Finished)
  tally.cached += event.cached
  if not answer.stopped and (
    problem := _problem(event, answer.tokens, trouble)
  ):
    raise problem
  return answer.finish(event.reason)


def _problem(event: Finished, tokens: int, trouble: str) -> Problem | None:
  if event.reason == FAILED and trouble:
    return wrong(trouble)
  if event.reason == FAILED:
    _LOG.error('the engine failed: %s', event.message)
    return broken("the engine failed; the server's log says why")
  if event.reason == CANCELLED:
    return later('the answer was cut off: the server stops', 5, 'cancelled')
  if event.reason == TIME and not tokens:
    return later(
      "the request's time was over before its first token; try again later, "
      'or ask for less',
      5,
      'timeout',
    )
  return None
