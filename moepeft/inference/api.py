# SPDX-License-Identifier: Apache-2.0
"""What the engine is asked and what it answers: token ids, never text.

The engine (`moepeft.inference.engine.engine`) runs on one thread, which owns
JAX. Others hand it a `Request` with a function that its events are delivered
to, from the engine's thread: an asyncio server passes `lambda event:
loop.call_soon_threadsafe(queue.put_nowait, event)`. A request's events are, in
order: `Prompt` where its log-probabilities are asked for, a `Token` each, and
exactly one `Finished`, after which nothing comes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from moepeft.inference.sampling import Sampling

# Why an answer ended.
STOP, LENGTH, CANCELLED, TIME, FAILED = (
  'stop',
  'length',
  'cancelled',
  'time',
  'failed',
)


class Constraint(Protocol):
  """What of the vocabulary may come next; one a request, used on one thread.

  `moepeft.inference.constraints.grammar` makes them of a JSON schema, a regular
  expression, a grammar or a choice.
  """

  def mask(self) -> np.ndarray:
    """bool [v], True for tokens that may come next; never all False."""

  def accept(self, token: int) -> bool:
    """Goes on by a token that the mask allows; whether the text must end."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to be gone on from.

  Attributes:
    id: of the caller's choice, unique among those under way.
    ids: the prompt's tokens: a decoder's text so far, T5's inputs.
    length: tokens of the answer at most; 0 where only the prompt's
      log-probabilities are wanted.
    adapter: the name of a loaded adapter; '' is the base.
    sampling: numbers, not arrays; greedy by default.
    seed: of the draws, which depend on it and on nothing beside the request.
    ends: ids that end the answer; the last token delivered is one of them.
    logprobs: how many alternatives each token comes with; None for no
      log-probabilities at all.
    prompt_logprobs: the same of the prompt's tokens (echo); decoders only.
    constraint: what may come next.
    routing: whether tokens come with what their routers did.
    seconds: the answer ends with TIME after so many, waiting included.
    client: requests of different clients take turns; '' is one of them.
  """

  id: str
  ids: tuple[int, ...]
  length: int
  adapter: str = ''
  sampling: Sampling = Sampling()
  seed: int = 0
  ends: tuple[int, ...] = ()
  logprobs: int | None = None
  prompt_logprobs: int | None = None
  constraint: Constraint | None = None
  routing: bool = False
  seconds: float | None = None
  client: str = ''


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """A token with its log-probability before temperature and filters.

  Attributes:
    id: the token.
    logprob: of it in nats; None of a prompt's first token.
    top: (id, logprob) of the most probable ones, the best first.
    experts: {site: weight of each expert, the mean over layers} where
      `routing` was asked for and the adapter routes.
  """

  id: int
  logprob: float | None = None
  top: tuple[tuple[int, float], ...] = ()
  experts: Mapping[str, tuple[float, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
  """The prompt's tokens, scored."""

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
    prompt: tokens of the prompt; cached: of these, not computed anew.
    answer: tokens of the answer.
    message: what failed, a sentence; else ''.
  """

  reason: str
  prompt: int
  cached: int = 0
  answer: int = 0
  message: str = ''


Event = PromptLogprobs | Token | Finished


class RequestRefused(ValueError):
  """A request that the engine does not take; a sentence for the user."""


class UnknownAdapter(RequestRefused):
  """There is no such adapter."""


class PromptTooLong(RequestRefused):
  """Prompt and answer do not fit the model's or the engine's places."""


class EngineFull(RequestRefused):
  """The queue is full.

  Attributes:
    seconds: when to try again, an estimate.
  """

  def __init__(self, message: str, seconds: float):
    super().__init__(message)
    self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
  """An adapter that can be asked for.

  Attributes:
    name: what requests call it.
    method: its text, as 'molora(experts=4, rank=4)'.
    sha256: of its content: the method, semantics and every array.
    bytes: of device memory.
    source: the path that it was read from.
    before: tokens of a soft prompt, which take places before every request's
      own and are no part of what is counted or told of it.
  """

  name: str
  method: str
  sha256: str
  bytes: int
  source: str
  before: int = 0


@dataclasses.dataclass(frozen=True)
class EngineStats:
  """Counts since the start, and what is under way.

  Attributes:
    running, waiting: requests.
    slots: rows that can run at once.
    finished: {reason: requests}.
    prompt_tokens, cached_tokens, answer_tokens: in all.
    compiled: programs so far; does not grow once `ready`.
    adapters: loaded ones; adapter_bytes: of their banks, empty slots too.
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


class Engine(Protocol):
  """What the server asks of an engine; every method may be called from any
  thread.

  Attributes:
    vocab: the size of the model's vocabulary.
    places: tokens of a prompt and its answer at most, together in a decoder;
      (inputs, answer) are (places, places) of an encoder-decoder.
    decoder_only: whether the prompt is part of the text.
    ready: whether a generation has run since the start.
  """

  vocab: int
  places: int
  decoder_only: bool

  @property
  def ready(self) -> bool: ...

  def start(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles every shape, runs a real generation, then takes requests.

    Args:
      progress: called with (what, done, all) before each program.
    """

  def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
    """Takes a request, or raises `Refused`; events come later."""

  def cancel(self, id: str) -> None:
    """Ends a request with CANCELLED; of an unknown id, nothing."""

  def adapters(self) -> Sequence[LoadedAdapter]:
    """What can be asked for beside the base."""

  def load(self, name: str, path: str) -> LoadedAdapter:
    """Reads an adapter (a run, or an exported directory) and puts it there.

    Requests under way go on with what they began with.

    Raises:
      ValueError: it cannot be read, is another base's, is not for serving, or
        there is no memory for it; what was loaded before stays.
    """

  def unload(self, name: str) -> None:
    """Takes an adapter away once no request uses it.

    Raises:
      Unknown: there is none.
    """

  def stats(self) -> EngineStats: ...

  def drain(self, seconds: float) -> bool:
    """Takes no more requests and waits; whether all have finished."""

  def stop(self) -> None:
    """Ends the thread; what is under way is CANCELLED."""
