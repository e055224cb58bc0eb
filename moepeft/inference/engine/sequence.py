# SPDX-License-Identifier: Apache-2.0
"""The state of a waiting or running request."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from moepeft.inference.adapters.fixed import AcquiredAdapter
from moepeft.inference.api import Event, Request, TokenLogprob
from moepeft.inference.engine.limits import check_embedding, find_task
from moepeft.inference.engine.prefix_cache import Slot


@dataclasses.dataclass(eq=False)
class Sequence:
  """The state of a waiting or running request.

  Attributes:
    request, deliver: the arguments of `Engine.submit`.
    arrival: the `time.monotonic` of the submission.
    ids: the soft prompt's and the prompt's ids; () while the request waits.
    slot, adapter: None while the request waits.
    task_id: the index of the request's task in the adapter's list, from 1; 0
      for none.
    answer: the answer's tokens so far.
    prefilled: whether the prompt is in the cache; in a decoder-only model all
      of it but the last token, which is the first decode step's input.
    num_cached_tokens: the number of prompt tokens taken from the cache.
    prompt_logprobs: the prompt's log-probabilities, if requested.
    previous: bool [v], the tokens in the repetition penalty; None without one.
    counts: float32 [v], the answer's number of each token, for the frequency
      and the presence penalty; None without them.
    bias: float32 [v], the logits' bias; None without one.
    cancelled: whether the client cancelled the request, or `deliver` failed.
    started: the `time.monotonic` at which it got its adapter and slot.
    has_finite_logits: whether a step with the cache of its slot gave finite
      logits.
  """

  request: Request
  deliver: Callable[[Event], None]
  arrival: float = dataclasses.field(default_factory=time.monotonic)
  ids: tuple[int, ...] = ()
  slot: Slot | None = None
  adapter: AcquiredAdapter | None = None
  task_id: int = 0
  answer: list[int] = dataclasses.field(default_factory=list)
  prefilled: bool = False
  num_cached_tokens: int = 0
  prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
  previous: np.ndarray | None = None
  counts: np.ndarray | None = None
  bias: np.ndarray | None = None
  cancelled: bool = False
  started: float = 0.0
  has_finite_logits: bool = False

  def set_adapter(self, adapter: AcquiredAdapter) -> None:
    """Sets the adapter, and puts its soft prompt before the prompt.

    Raises:
      RequestRefused: the request's task is not one of the adapter's, or its
        embedding has another size.
    """
    self.adapter, self.started = adapter, time.monotonic()
    self.ids = (*adapter.soft_prompt_ids, *self.request.prompt_ids)
    self.task_id = find_task(self.request.task, adapter.tasks)
    check_embedding(self.request.embedding, adapter.embedding_size)

  @property
  def cache_key(self) -> str:
    """Equal for sequences whose equal ids have equal keys and values."""
    embedding = np.array(self.request.embedding, np.float32).tobytes().hex()
    return f'{self.adapter.sha256}/{self.task_id}/{embedding}'

  @property
  def prompt_size(self) -> int:
    """The number of `ids` that a router of the prompt reads."""
    size = self.request.prompt_size
    size = len(self.request.prompt_ids) if size is None else size
    return len(self.adapter.soft_prompt_ids) + size

  def timed_out(self, now: float) -> bool:
    timeout = self.request.timeout
    return timeout is not None and now - self.arrival >= timeout

  def emit(self, event: Event) -> None:
    """Delivers an event; cancels the request if `deliver` raises."""
    try:
      self.deliver(event)
    except Exception:
      self.cancelled = True

  def append(self, token: int) -> None:
    """Adds a token to the answer."""
    self.answer.append(token)
    self.has_finite_logits = True
    if self.previous is not None:
      self.previous[token] = True
    if self.counts is not None:
      self.counts[token] += 1

  def track_previous(self, prompt: tuple[int, ...], v: int) -> None:
    """Initializes `previous`, `counts` and `bias` as the request needs them."""
    s = self.request.sampling
    if s.repetition_penalty is not None:
      self.previous = np.zeros(v, bool)
      self.previous[list(prompt)] = True
    if s.frequency_penalty or s.presence_penalty:
      self.counts = np.zeros(v, np.float32)
    if s.logit_bias:
      self.bias = np.zeros(v, np.float32)
      for token, number in s.logit_bias:
        self.bias[token] = number
