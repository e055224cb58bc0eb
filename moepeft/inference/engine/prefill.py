# SPDX-License-Identifier: Apache-2.0
"""How prompts are read: a decoder's in chunks, an encoder-decoder's at once.

Both leave the slot so that the next step gives the answer's first token: a
decoder's prompt is read up to its last token, which the step takes.
"""

import collections
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from moepeft.core.types import Array
from moepeft.inference.api import PromptLogprobs, TokenLogprob
from moepeft.inference.decode import PAD
from moepeft.inference.engine.limits import at_least
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefix_cache import PrefixCache
from moepeft.inference.engine.sequence import Running, experts_of, top_of


class Reader(Protocol):
  """What differs between the two."""

  def begin(self, row: Running) -> None:
    """Gives a slot to a row that holds its adapter."""

  def read(self, row: Running) -> None:
    """Reads on; `row.read` once that was the last."""

  def need(self, row: Running) -> int:
    """Places that the row's next step looks at."""

  def inputs(self, rows: Sequence[Running]) -> tuple[np.ndarray, ...]:
    """What a step takes beside adapters and slots: int32 [n] each."""

  def stepped(self, row: Running) -> None:
    """Notes that a step has taken what `inputs` said of a row."""


class Chunks:
  """Of a decoder."""

  def __init__(self, core: ModelRunner, texts: PrefixCache):
    self._core, self._texts = core, texts

  def begin(self, row: Running) -> None:
    ids = row.ids
    # What is scored must be computed.
    known = ids[:-1] if row.request.prompt_logprobs is None else ()
    place = self._texts.take(known, row.held.sha256)
    row.slot = place.slot
    row.cached = max(0, len(place.slot.ids) - len(row.held.before))
    row.penalised(row.request.ids, self._core.model.config.vocab)
    if place.source is not None:
      self._core.copy(place.source.number, place.slot.number)
    self._look(row)

  def read(self, row: Running) -> None:
    ids, slot = row.ids, row.slot
    start = len(slot.ids)
    t = self._size(len(ids) - 1 - start, start)
    real = min(t, len(ids) - 1 - start)
    states, told = self._core.fill(
      t,
      at_least(self._core.rooms, start + t),
      row.held.row,
      slot.number,
      _padded(ids[start : start + real], t),
      start,
      real,
    )
    if row.request.prompt_logprobs is not None:
      self._score(row, states, told, start + 1, start + 1 + real)
    slot.ids.extend(ids[start : start + real])
    self._look(row)

  def need(self, row: Running) -> int:
    return len(row.ids) + len(row.answer)

  def inputs(self, rows: Sequence[Running]) -> tuple[np.ndarray, ...]:
    tokens = [(row.answer or row.ids)[-1] for row in rows]
    places = [self.need(row) - 1 for row in rows]
    return np.array(tokens, np.int32), np.array(places, np.int32)

  def stepped(self, row: Running) -> None:
    row.slot.ids.append((row.answer or row.ids)[-1])

  def _size(self, left: int, start: int) -> int:
    """A chunk's length: what is left and little padding, or less than that."""
    sizes = [
      t for t in self._core.settings.chunks if start + t <= self._core.rooms[-1]
    ]
    for t in sizes:
      if t >= left and (t == sizes[0] or 4 * left >= 3 * t):
        return t
    return max([t for t in sizes if t <= left], default=sizes[0])

  def _look(self, row: Running) -> None:
    """Whether all is read; then what was asked of the prompt is said."""
    row.read = len(row.slot.ids) == len(row.ids) - 1
    if row.read and row.request.prompt_logprobs is not None:
      row.say(PromptLogprobs((TokenLogprob(row.request.ids[0]), *row.scored)))

  def _score(
    self, row: Running, states: Array, told, first: int, end: int
  ) -> None:
    """Notes what was said of the prompt's tokens from one place to another,
    but for those of a soft prompt, and what follows it as if nothing did."""
    t, front = len(states), len(row.held.before)
    following = [
      token if first + i > front else PAD
      for i, token in enumerate(row.ids[first:end])
    ]
    args = row.held.row, states, _padded(following, t)
    wanted = told if row.request.routing else {}
    logprobs, ids, best, told = jax.device_get(
      (*self._core.score(t, *args), wanted)
    )
    if not np.isfinite(logprobs[: len(following)]).all():
      raise ArithmeticError("the prompt's log-probabilities are no numbers")
    for i, token in enumerate(following):
      if first + i <= front:
        continue
      row.scored.append(
        TokenLogprob(
          token,
          float(logprobs[i]),
          top_of(ids[i], best[i], row.request.prompt_logprobs),
          experts_of(told, i, row),
        )
      )


class Inputs:
  """Of an encoder-decoder.

  What was encoded is kept, by the adapter's hash and the inputs.
  """

  def __init__(self, core: ModelRunner, texts: PrefixCache):
    self._core, self._texts = core, texts
    # The one used longest ago first.
    self._kept: collections.OrderedDict[tuple, Array] = (
      collections.OrderedDict()
    )

  def begin(self, row: Running) -> None:
    row.slot = self._texts.take((), row.held.sha256).slot
    row.penalised((PAD,), self._core.model.config.vocab)

  def read(self, row: Running) -> None:
    states = self._states(row)
    length, slot = len(row.ids), row.slot.number
    self._core.attach(len(states), row.held.row, slot, states, length)
    row.read = True

  def need(self, row: Running) -> int:
    return max(len(row.ids), len(row.answer) + 1)

  def inputs(self, rows: Sequence[Running]) -> tuple[np.ndarray, ...]:
    tokens = [row.answer[-1] if row.answer else PAD for row in rows]
    places = [len(row.answer) for row in rows]
    lengths = [len(row.ids) for row in rows]
    return tuple(np.array(a, np.int32) for a in (tokens, places, lengths))

  def stepped(self, row: Running) -> None:
    pass

  def _states(self, row: Running) -> Array:
    ids = row.ids
    key = row.held.sha256, ids
    if key in self._kept:
      self._kept.move_to_end(key)
      row.cached = len(row.request.ids)
      return self._kept[key]
    s = at_least(self._core.settings.inputs, len(ids))
    padded = _padded(ids, s)
    states = self._core.encode(s, row.held.row, padded, len(ids))
    self._keep(key, states)
    return states

  def _keep(self, key: tuple, states: Array) -> None:
    self._kept[key] = states
    size = sum(kept.nbytes for kept in self._kept.values())
    while self._kept and size > self._core.settings.encoder_bytes:
      size -= self._kept.popitem(last=False)[1].nbytes


def _padded(ids: Sequence[int], t: int) -> np.ndarray:
  """int32 [t]."""
  found = np.zeros(t, np.int32)
  found[: len(ids)] = ids
  return found
