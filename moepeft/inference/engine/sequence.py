# SPDX-License-Identifier: Apache-2.0
"""A request that is waiting or running, and its state."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from moepeft.inference.adapters.fixed import AcquiredAdapter
from moepeft.inference.api import Event, Request, TokenLogprob
from moepeft.inference.engine.prefix_cache import Slot


@dataclasses.dataclass(eq=False)
class Sequence:
  """A request, waiting or in a slot.

  Attributes:
    request, deliver: as submitted.
    arrival: time of `time.monotonic`.
    ids: the prompt's, behind the adapter's soft prompt; () while it waits.
    slot, adapter: None while it waits.
    answer: tokens so far.
    prefilled: whether all of the prompt is read but its last token, which the
      first step takes.
    cached: number of prompt tokens that were not computed again.
    prompt_logprobs: of the prompt, where asked for.
    previous: bool [v], the tokens that a repetition penalty acts on; None
      without one.
    cancelled: by the client, or because its listener failed.
    started: when it got its adapter and slot.
    finite: whether the cache of its slot is known to give finite logits.
  """

  request: Request
  deliver: Callable[[Event], None]
  arrival: float = dataclasses.field(default_factory=time.monotonic)
  ids: tuple[int, ...] = ()
  slot: Slot | None = None
  adapter: AcquiredAdapter | None = None
  answer: list[int] = dataclasses.field(default_factory=list)
  prefilled: bool = False
  cached: int = 0
  prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
  previous: np.ndarray | None = None
  cancelled: bool = False
  started: float = 0.0
  finite: bool = False

  def use(self, adapter: AcquiredAdapter) -> None:
    """Puts the adapter's soft prompt before the prompt."""
    self.adapter, self.started = adapter, time.monotonic()
    self.ids = (*adapter.soft_prompt_ids, *self.request.prompt_ids)

  def timed_out(self, now: float) -> bool:
    timeout = self.request.timeout
    return timeout is not None and now - self.arrival >= timeout

  def emit(self, event: Event) -> None:
    """Delivers an event; a listener that fails cancels the request."""
    try:
      self.deliver(event)
    except Exception:
      self.cancelled = True

  def append(self, token: int) -> None:
    """Adds a token to the answer."""
    self.answer.append(token)
    self.finite = True
    if self.previous is not None:
      self.previous[token] = True

  def track_previous(self, prompt: tuple[int, ...], v: int) -> None:
    """Starts to record tokens, where their repetition is penalised."""
    if self.request.sampling.repetition_penalty is not None:
      self.previous = np.zeros(v, bool)
      self.previous[list(prompt)] = True
