# SPDX-License-Identifier: Apache-2.0
"""Requests to the engine and its answers: token ids, never text.

The engine (`moepeft.inference.engine.engine`) delivers a request's events to
the function that was submitted with it, in this order: `PromptLogprobs` where
they were asked for, a `Token` for each new token, and exactly one `Finished`,
which is the last.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from moepeft.inference.sampling import Sampling

# The reasons for which an answer ends.
STOP, LENGTH, CANCELLED, TIME, FAILED = (
  'stop',
  'length',
  'cancelled',
  'time',
  'failed',
)


class Constraint(Protocol):
  """A limit on the next token; one object a request, used on one thread.

  `moepeft.inference.constraints.grammar` makes them of a JSON schema, a regular
  expression, a grammar or a choice; `moepeft.serve` wraps them.
  """

  def mask(self) -> np.ndarray:
    """bool [v], True for tokens that may come next; never all False."""

  def accept(self, token: int) -> bool:
    """Advances by a token that the mask allows; True if the text must end."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to be continued.

  Attributes:
    id: unique among the requests that have not finished.
    prompt_ids: tokens of a decoder's text so far, or of T5's inputs.
    max_new_tokens: 0 where only the prompt's log-probabilities are wanted.
    adapter: name of a loaded adapter; '' is the base.
    sampling: numbers, not arrays; greedy by default.
    seed: the draws depend on it and on nothing beside the request.
    eos_token_ids: ids that end the answer; the answer includes its end.
    logprobs: number of alternatives reported with each token; None for no
      log-probabilities at all.
    prompt_logprobs: the same for the prompt's tokens (echo); decoders only.
    constraint: limits the next token.
    routing: whether tokens are reported with their experts' weights.
    timeout: seconds after which the answer ends with TIME, waiting included.
    client: requests of different clients take turns; '' is one of them.
    min_new_tokens: before so many tokens no end is chosen.
  """

  id: str
  prompt_ids: tuple[int, ...]
  max_new_tokens: int
  adapter: str = ''
  sampling: Sampling = Sampling()
  seed: int = 0
  eos_token_ids: tuple[int, ...] = ()
  logprobs: int | None = None
  prompt_logprobs: int | None = None
  constraint: Constraint | None = None
  routing: bool = False
  timeout: float | None = None
  client: str = ''
  min_new_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """A token with its log-probability before temperature and filters.

  Attributes:
    id: the token.
    logprob: in nats; None for a prompt's first token.
    top: (id, logprob) of the most probable tokens, the best first.
    experts: {site: weight of each expert, averaged over layers} where
      `routing` was asked for and the adapter routes.
  """

  id: int
  logprob: float | None = None
  top: tuple[tuple[int, float], ...] = ()
  experts: Mapping[str, tuple[float, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
  """The prompt's tokens with their log-probabilities."""

  tokens: tuple[TokenLogprob, ...]


@dataclasses.dataclass(frozen=True)
class Token:
  """A new token of the answer."""

  token: TokenLogprob


@dataclasses.dataclass(frozen=True)
class Finished:
  """The last event of a request.

  Attributes:
    reason: STOP (an end or a finished constraint), LENGTH, CANCELLED, TIME or
      FAILED.
    prompt: number of the prompt's tokens.
    cached: number of prompt tokens that were not computed again.
    answer: number of the answer's tokens.
    message: the failure in a sentence; else ''.
  """

  reason: str
  prompt: int
  cached: int = 0
  answer: int = 0
  message: str = ''


Event = PromptLogprobs | Token | Finished


@dataclasses.dataclass(frozen=True)
class GeneratedAnswer:
  """The whole answer to a request.

  Attributes:
    tokens: the answer's, its end included.
    finished: the last event.
  """

  tokens: tuple[TokenLogprob, ...]
  finished: Finished

  @property
  def ids(self) -> list[int]:
    return [token.id for token in self.tokens]


@dataclasses.dataclass(frozen=True)
class LogprobRequest:
  """An answer whose log-probability is wanted.

  Attributes:
    prompt_ids: tokens of a decoder's prompt, or of T5's inputs.
    answer_ids: the tokens that are scored, their end included.
    adapter: name of a loaded adapter; '' is the base.
  """

  prompt_ids: tuple[int, ...]
  answer_ids: tuple[int, ...]
  adapter: str = ''


class RequestRefused(ValueError):
  """A request that the engine does not take; a sentence for the user."""


class UnknownAdapter(RequestRefused):
  """There is no such adapter."""


class PromptTooLong(RequestRefused):
  """Prompt and answer do not fit the model's or the engine's lengths."""


class EngineFull(RequestRefused):
  """The queue, or a bucket's adapter slots, are full.

  Attributes:
    seconds: estimated time until a retry may succeed.
  """

  def __init__(self, message: str, seconds: float):
    super().__init__(message)
    self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
  """An adapter that requests may name.

  Attributes:
    name: its name in requests.
    method: its text, as 'molora(experts=4, rank=4)'.
    sha256: hash of its content: the method, semantics and every array.
    bytes: device memory that it takes.
    source: the path that it was read from.
    soft_prompt_length: tokens of its soft prompt. They take cache entries
      before every request's own tokens and are not counted or reported.
  """

  name: str
  method: str
  sha256: str
  bytes: int
  source: str
  soft_prompt_length: int = 0


@dataclasses.dataclass(frozen=True)
class EngineStats:
  """Counts since the start, and the present load.

  Attributes:
    running, waiting: requests.
    slots: sequences that can run at once.
    finished: {reason: requests}.
    prompt_tokens, cached_tokens, answer_tokens: totals.
    compiled: number of compiled programs; constant once the engine is ready.
    adapters: number of loaded adapters.
    adapter_bytes: memory of the pool, empty slots included.
  """

  running: int
  waiting: int
  slots: int
  finished: Mapping[str, int]
  prompt_tokens: int
  cached_tokens: int
  answer_tokens: int
  compiled: int
  adapters: int
  adapter_bytes: int
