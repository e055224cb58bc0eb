# SPDX-License-Identifier: Apache-2.0
"""Decodes an answer's tokens to text, up to a stop string."""

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
  """A token of an answer.

  Attributes:
    offset: the offset of its text in the answer, in characters.
    is_eos: whether it is an eos token, which has no text.
  """

  scored: TokenLogprob
  offset: int
  is_eos: bool = False


@dataclasses.dataclass(frozen=True)
class AnswerDelta:
  """The new part of an answer.

  Attributes:
    text: the new text, without incomplete characters and stop strings.
    entries: the tokens of the text.
    prompt: the tokens of the prompt, if requested.
    reason: the finish reason, see `moepeft.inference.api`; '' before the end.
  """

  text: str = ''
  entries: tuple[TokenEntry, ...] = ()
  prompt: tuple[TokenLogprob, ...] = ()
  reason: str = ''

  def __add__(self, delta: 'AnswerDelta') -> 'AnswerDelta':
    return AnswerDelta(
      self.text + delta.text,
      self.entries + delta.entries,
      self.prompt + delta.prompt,
      self.reason or delta.reason,
    )


class AnswerStream:
  """The text of one answer.

  Attributes:
    tokens: the number of tokens so far, with those of a stop string.
    stopped: whether a stop string was found.
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
      eos_token_ids: ids that end the answer and are not decoded.
      prefix_ids: ids before the answer; they may decide whether its text begins
        with a space.
    """
    self._detokenizer = Detokenizer(tokenizer.decode)
    self._markers = SpecialTokenMarkers(tokenizer.special_tokens, stops)
    self._stops = StopStrings(self._markers.stops)
    self._detokenizer.feed(prefix_ids)
    self._eos_token_ids = frozenset(eos_token_ids)
    self._pending: list[TokenEntry] = []
    # Numbers of characters.
    self._decoded_chars = self._released_chars = 0
    self.tokens, self.stopped = 0, False

  def feed(self, token: TokenLogprob) -> AnswerDelta:
    if self.stopped:
      return AnswerDelta()
    self.tokens += 1
    is_eos = token.id in self._eos_token_ids
    self._pending.append(TokenEntry(token, self._decoded_chars, is_eos))
    if is_eos:
      return AnswerDelta()
    delta = self._release(self._detokenizer.feed([token.id]))
    marker = self._markers.by_token.get(token.id)
    if marker and not self.stopped:
      delta += self._release(marker)
    return delta

  def finish(self, reason: str) -> AnswerDelta:
    """The rest of the answer, with its finish reason."""
    if self.stopped:
      return AnswerDelta(reason=STOP)
    last = self._release(self._detokenizer.finish())
    if not self.stopped:
      text = self._markers.remove(self._stops.finish())
      last += AnswerDelta(text, tuple(self._pending))
    return last + AnswerDelta(reason=STOP if self.stopped else reason)

  def _release(self, text: str) -> AnswerDelta:
    self._decoded_chars += len(self._markers.remove(text))
    released = self._markers.remove(self._stops.feed(text))
    self._released_chars += len(released)
    self.stopped = self._stops.matched
    # A token is withheld with its text.
    count = sum(entry.offset < self._released_chars for entry in self._pending)
    entries, self._pending = self._pending[:count], self._pending[count:]
    return AnswerDelta(released, tuple(entries))


async def answer_deltas(
  engine_requests: ClientRequests,
  answers: Sequence[AnswerStream],
  stats: RequestStats,
) -> AsyncIterator[list[tuple[int, AnswerDelta]]]:
  """Yields the new deltas of several answers, at most one of each at a time.

  Raises:
    ApiError: an answer failed, or timed out before its first token.
  """
  async for batch in engine_requests.batches():
    new_deltas: dict[int, AnswerDelta] = {}
    for index, event in batch:
      try:
        delta = _event_delta(
          answers[index], event, stats, engine_requests.constraint_error(index)
        )
      except ApiError:
        # The earlier deltas of the batch are not lost.
        yield list(new_deltas.items())
        raise
      if answers[index].stopped:
        engine_requests.cancel(index)
      new_deltas[index] = new_deltas.get(index, AnswerDelta()) + delta
    yield list(new_deltas.items())


def _event_delta(
  answer: AnswerStream, event: Event, stats: RequestStats, constraint_error: str
) -> AnswerDelta:
  if isinstance(event, PromptLogprobs):
    return AnswerDelta(prompt=event.tokens)
  if isinstance(event, Token):
    # Tokens after a stop string are not billed.
    stats.add_tokens(not answer.stopped)
    return answer.feed(event.token)
  assert isinstance(event, Finished)
  stats.cached += event.cached
  if not answer.stopped and (
    error := _finish_error(event, answer.tokens, constraint_error)
  ):
    raise error
  return answer.finish(event.reason)


def _finish_error(
  event: Finished, tokens: int, constraint_error: str
) -> ApiError | None:
  if event.reason == FAILED and constraint_error:
    return invalid_request(constraint_error)
  if event.reason == FAILED:
    _LOG.error('the engine failed: %s', event.message)
    return server_error("the engine failed; the server's log says why")
  if event.reason == CANCELLED:
    return unavailable(
      'the answer was cancelled: the server is shutting down',
      5,
      'cancelled',
    )
  if event.reason == TIME and not tokens:
    return unavailable(
      'the request timed out before its first token; try again later, or send '
      'less',
      5,
      'timeout',
    )
  return None
