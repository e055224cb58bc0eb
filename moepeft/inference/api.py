# SPDX-License-Identifier: Apache-2.0
"""Requests to the engine, and the events of their answers, as token ids.

The engine (`moepeft.inference.engine.engine`) delivers a request's events to
the function that was submitted with it, in this order: one `PromptLogprobs` if
requested, a `Token` for each new token, and one `Finished`.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

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
  """Restricts the next token of one request; used on one thread.

  `moepeft.inference.constraints.grammar` implements it for JSON schemas,
  regular expressions, grammars and choices.
  """

  def mask(self) -> np.ndarray:
    """bool [v], True for the allowed next tokens; never all False."""

  def accept(self, token: int) -> bool:
    """Advances by an allowed token; returns True if the answer must end."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to be continued.

  Attributes:
    id: unique among the requests that have not finished.
    prompt_ids: the ids of a decoder's prompt, or of an encoder's inputs.
    max_new_tokens: the maximum number of answer tokens; 0 computes only the
      prompt's log-probabilities.
    adapter: the name of a loaded adapter; '' is the base.
    sampling: the sampling parameters, numbers; greedy by default.
    seed: the sampling seed; an answer does not depend on other requests.
    eos_token_ids: ids that end the answer and are its last token.
    logprobs: the number of alternatives reported with each token; None reports
      no log-probabilities.
    prompt_logprobs: the same for the prompt's tokens (echo); only for
      decoder-only models.
    constraint: restricts the next token.
    routing: whether tokens are reported with their experts' weights.
    timeout: seconds, queueing included, after which the answer ends with TIME.
    client: the client's name; the queue is fair between clients.
    min_new_tokens: the minimum number of tokens before an eos token.
    task: the task's name, for adapters that route by the task; '' for none.
    embedding: a vector, for adapters that route by an embedding; () for none.
    prompt_size: the number of `prompt_ids` that adapters which route by the
      prompt read; None for all.
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
  task: str = ''
  embedding: tuple[float, ...] = ()
  prompt_size: int | None = None


class RouterFields(NamedTuple):
  """The fields of a request that routers read; see `Request`."""

  task: str = ''
  embedding: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """A token with its log-probability before temperature and filters.

  Attributes:
    id: the token.
    logprob: in nats; None for a prompt's first token.
    top: (id, logprob) of the most probable tokens, best first.
    layer_experts: {target module: weights [l, e] of the experts}, NaN for
      experts that a layer does not have; None without `routing` or without a
      router.
  """

  id: int
  logprob: float | None = None
  top: tuple[tuple[int, float], ...] = ()
  # `==` has no truth value for arrays.
  layer_experts: Mapping[str, np.ndarray] | None = dataclasses.field(
    default=None, compare=False
  )

  @property
  def experts(self) -> dict[str, tuple[float, ...]] | None:
    """{target module: weight of each expert, averaged over layers}, or None."""
    if self.layer_experts is None:
      return None
    return {
      site: tuple(np.nan_to_num(weights).mean(axis=0).tolist())
      for site, weights in self.layer_experts.items()
    }


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
    reason: STOP (an eos token or a finished constraint), LENGTH, CANCELLED,
      TIME or FAILED.
    prompt: the number of prompt tokens.
    cached: the number of prompt tokens taken from the cache.
    answer: the number of answer tokens.
    message: the error message if the reason is FAILED; otherwise ''.
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
    tokens: the tokens of the answer, its eos token included.
    finished: the last event of the request.
  """

  tokens: tuple[TokenLogprob, ...]
  finished: Finished

  @property
  def ids(self) -> list[int]:
    return [token.id for token in self.tokens]


@dataclasses.dataclass(frozen=True)
class LogprobRequest:
  """An answer to be scored.

  Attributes:
    prompt_ids: the ids of a decoder's prompt, or of an encoder's inputs.
    answer_ids: the ids that are scored, the eos token included.
    adapter: the name of a loaded adapter; '' is the base.
    task, embedding: see `Request`.
  """

  prompt_ids: tuple[int, ...]
  answer_ids: tuple[int, ...]
  adapter: str = ''
  task: str = ''
  embedding: tuple[float, ...] = ()


class RequestRefused(ValueError):
  """The engine does not accept a request; the message is for the client."""


class UnknownAdapter(RequestRefused):
  """No adapter has the requested name."""


class PromptTooLong(RequestRefused):
  """Prompt and answer exceed the maximum length."""


class EngineFull(RequestRefused):
  """The queue, or the adapter slots of a bucket, are full.

  Attributes:
    seconds: the estimated time until a retry may succeed.
  """

  def __init__(self, message: str, seconds: float):
    super().__init__(message)
    self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
  """An adapter that requests may name.

  Attributes:
    name: the name that requests use.
    method: the method string, such as 'molora(experts=4, rank=4)'.
    sha256: hash of the method, the semantics and every array.
    bytes: the device memory of a slot.
    source: the path from which it was read.
    soft_prompt_length: the number of tokens of the soft prompt. They take cache
      entries before each prompt, and are not counted as prompt tokens.
    tasks: the names of tasks, of which a request has to name one; () if it
      names none.
    embedding_size: the size of the embedding that a request has to give; 0 if
      it gives none.
    routing: whether it has a router, so that tokens can be reported with their
      experts' weights.
  """

  name: str
  method: str
  sha256: str
  bytes: int
  source: str
  soft_prompt_length: int = 0
  tasks: tuple[str, ...] = ()
  embedding_size: int = 0
  routing: bool = False


@dataclasses.dataclass(frozen=True)
class EngineStats:
  """The present load, and counts since the start.

  Attributes:
    running, waiting: the numbers of running and waiting requests.
    slots: the number of sequences that can run at once.
    finished: {finish reason: number of requests}.
    prompt_tokens, cached_tokens, answer_tokens: totals over finished requests.
    proposed_tokens, accepted_tokens: totals over decode steps, of tokens that
      were proposed and of those that became the answer's.
    compiled: the number of compiled programs; constant when ready.
    adapters: the number of loaded adapters.
    adapter_bytes: device memory of the adapter pool, empty slots included.
  """

  running: int
  waiting: int
  slots: int
  finished: Mapping[str, int]
  prompt_tokens: int
  cached_tokens: int
  answer_tokens: int
  proposed_tokens: int
  accepted_tokens: int
  compiled: int
  adapters: int
  adapter_bytes: int
