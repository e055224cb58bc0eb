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
from moepeft.serve.http.errors import (
  ApiError,
  invalid_request,
  server_error,
  unavailable,
)
from moepeft.serve.http.event_bridge import ClientRequests
from moepeft.serve.http.request_stats import RequestStats
from moepeft.serve.http.text import ServedTokenizer

_LOG = logging.getLogger('moepeft.serve')
# OpenAI's finish reasons; it has none for a timeout.
FINISH_REASONS = {
  STOP: 'stop',
  LENGTH: 'length',
  TIME: 'length',
}


@dataclasses.dataclass(frozen=True)
class TokenEntry:
  """A token of an answer, and where its text begins.

  Attributes:
    end: whether it ends the answer and is no text.
  """

  scored: TokenLogprob
  offset: int
  end: bool = False


@dataclasses.dataclass(frozen=True)
class AnswerDelta:
  """The new part of an answer.

  Attributes:
    text: never half a character, and nothing of a stop string.
    entries: tokens whose text is out by now.
    prompt: its tokens, where they were asked for.
    reason: why it ended, of `protocol`; '' while it goes on.
  """

  text: str = ''
  entries: tuple[TokenEntry, ...] = ()
  prompt: tuple[TokenLogprob, ...] = ()
  reason: str = ''

  def __add__(self, later: 'AnswerDelta') -> 'AnswerDelta':
    return AnswerDelta(
      self.text + later.text,
      self.entries + later.entries,
      self.prompt + later.prompt,
      self.reason or later.reason,
    )


class AnswerStream:
  """One answer.

  Attributes:
    tokens: that have come; those of a stop string are among them.
    stopped: whether a stop string was met.
  """

  def __init__(
    self,
    tokenizer: ServedTokenizer,
    eos_token_ids: Sequence[int],
    stops: Sequence[str] = (),
    prefix_ids: Sequence[int] = (),
  ):
    """
    Args:
      eos_token_ids: ids that end it and are no text.
      before: ids whose text the answer's is joined to, as a space may be at
        the joint.
    """
    self._detokenizer = Detokenizer(tokenizer.decode)
    self._markers = SpecialTokenMarkers(tokenizer.special_tokens, stops)
    self._stops = StopStrings(self._markers.stops)
    self._detokenizer.feed(prefix_ids)
    self._ends = frozenset(eos_token_ids)
    self._pending: list[TokenEntry] = []
    # Characters that were decoded, and of these, those that were sent.
    self._read = self._sent = 0
    self.tokens, self.stopped = 0, False

  def feed(self, token: TokenLogprob) -> AnswerDelta:
    if self.stopped:
      return AnswerDelta()
    self.tokens += 1
    end = token.id in self._ends
    self._pending.append(TokenEntry(token, self._read, end))
    if end:
      return AnswerDelta()
    delta = self._release(self._detokenizer.feed([token.id]))
    marker = self._markers.of.get(token.id)
    if marker and not self.stopped:
      delta += self._release(marker)
    return delta

  def finish(self, reason: str) -> AnswerDelta:
    """The rest of the answer, with its finish reason."""
    if self.stopped:
      return AnswerDelta(reason=STOP)
    last = self._release(self._detokenizer.finish())
    if not self.stopped:
      rest = self._markers.removed(self._stops.finish())
      last += AnswerDelta(rest, tuple(self._pending))
    return last + AnswerDelta(reason=STOP if self.stopped else reason)

  def _release(self, text: str) -> AnswerDelta:
    self._read += len(self._markers.removed(text))
    out = self._markers.removed(self._stops.feed(text))
    self._sent += len(out)
    self.stopped = self._stops.matched
    # A token whose text may become a stop string waits with it.
    count = sum(entry.offset < self._sent for entry in self._pending)
    entries, self._pending = self._pending[:count], self._pending[count:]
    return AnswerDelta(out, tuple(entries))


async def answer_deltas(
  engine_requests: ClientRequests,
  answers: Sequence[AnswerStream],
  stats: RequestStats,
) -> AsyncIterator[list[tuple[int, AnswerDelta]]]:
  """New parts of several answers, at most one of each at a time.

  Raises:
    ApiError: one of them failed, or got no token in its time.
  """
  async for batch in engine_requests.batches():
    new_deltas: dict[int, AnswerDelta] = {}
    for index, event in batch:
      try:
        new = _event_delta(
          answers[index], event, stats, engine_requests.trouble(index)
        )
      except ApiError:
        # What came before it is given out first.
        yield list(new_deltas.items())
        raise
      if answers[index].stopped:
        engine_requests.end(index)
      new_deltas[index] = new_deltas.get(index, AnswerDelta()) + new
    yield list(new_deltas.items())


def _event_delta(
  answer: AnswerStream, event: Event, stats: RequestStats, constraint_error: str
) -> AnswerDelta:
  if isinstance(event, PromptLogprobs):
    return AnswerDelta(prompt=event.tokens)
  if isinstance(event, Token):
    # Tokens after a stop string are not billed.
    stats.tokens(not answer.stopped)
    return answer.feed(event.token)
  assert isinstance(event, Finished)
  stats.cached += event.cached
  if not answer.stopped and (
    problem := _problem(event, answer.tokens, constraint_error)
  ):
    raise problem
  return answer.finish(event.reason)


def _problem(
  event: Finished, tokens: int, constraint_error: str
) -> ApiError | None:
  if event.reason == FAILED and constraint_error:
    return invalid_request(constraint_error)
  if event.reason == FAILED:
    _LOG.error('the engine failed: %s', event.message)
    return server_error("the engine failed; the server's log says why")
  if event.reason == CANCELLED:
    return unavailable(
      'the answer was cut off: the server stops', 5, 'cancelled'
    )
  if event.reason == TIME and not tokens:
    return unavailable(
      "the request's time was over before its first token; try again later, "
      'or ask for less',
      5,
      'timeout',
    )
  return None
