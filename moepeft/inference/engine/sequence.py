# SPDX-License-Identifier: Apache-2.0
"""A request under way: what is computed of it, and what was said of it."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

from moepeft.inference.adapters.protocol import Held
from moepeft.inference.api import Event, Request, TokenLogprob
from moepeft.inference.engine.prefix_cache import Slot


@dataclasses.dataclass(eq=False)
class Running:
  """A request, waiting or in a slot.

  Attributes:
    request, deliver: as submitted.
    born: when, of `time.monotonic`.
    ids: the prompt's, behind the soft prompt's of the adapter; () while it
      waits.
    slot, held: None while it waits.
    answer: tokens so far.
    read: whether the whole prompt is, but for what the first step takes.
    cached: tokens of the prompt that were not computed anew.
    scored: of the prompt, where asked for.
    seen: bool [v], what a repetition penalty is for; None without one.
    gone: whether it was cancelled, or nobody listens any more.
    began: when it got its slot.
    sound: whether what its slot holds was seen to give numbers.
  """

  request: Request
  deliver: Callable[[Event], None]
  born: float = dataclasses.field(default_factory=time.monotonic)
  ids: tuple[int, ...] = ()
  slot: Slot | None = None
  held: Held | None = None
  answer: list[int] = dataclasses.field(default_factory=list)
  read: bool = False
  cached: int = 0
  scored: list[TokenLogprob] = dataclasses.field(default_factory=list)
  seen: np.ndarray | None = None
  gone: bool = False
  began: float = 0.0
  sound: bool = False

  def hold(self, held: Held) -> None:
    """Goes on with an adapter."""
    self.held, self.ids = held, (*held.before, *self.request.ids)

  def late(self, now: float) -> bool:
    """Whether its time is over."""
    seconds = self.request.seconds
    return seconds is not None and now - self.born >= seconds

  def say(self, event: Event) -> None:
    """Delivers an event; a listener that fails is gone."""
    try:
      self.deliver(event)
    except Exception:
      self.gone = True

  def add(self, token: int) -> None:
    """Notes a token of the answer."""
    self.answer.append(token)
    self.sound = True
    if self.seen is not None:
      self.seen[token] = True

  def penalised(self, prompt: tuple[int, ...], v: int) -> None:
    """Begins to note tokens, where there is a penalty for repeating them."""
    if self.request.sampling.repetition_penalty is not None:
      self.seen = np.zeros(v, bool)
      self.seen[list(prompt)] = True


def top_of(
  ids: np.ndarray, logprobs: np.ndarray, count: int | None
) -> tuple[tuple[int, float], ...]:
  """(id, log-probability) of the first `count`."""
  pairs = zip(ids[: count or 0], logprobs[: count or 0], strict=True)
  return tuple((int(i), float(p)) for i, p in pairs)


def experts_of(
  told: Mapping[str, np.ndarray], i: int, row: Running
) -> dict[str, tuple[float, ...]] | None:
  """The weights [e] at each site where the row's own adapter routes.

  Args:
    told: {path: [n, e]} of all forms, a path being a site's with the names
      of the adapter and its router in it.
    i: the row's number there.

  Returns:
    None where none was asked for, or its adapter does not route.
  """
  if not row.request.routing:
    return None
  found = {}
  for path, weights in told.items():
    keys = path.split('/')
    for at, key in enumerate(keys):
      # A whole sublayer's adapters lie beside it.
      site = '/'.join(keys[:at]).replace('/around_', '/')
      if site in row.held.sites.get(key, ()):
        found[site] = tuple(float(w) for w in weights[i])
  return found or None
