# SPDX-License-Identifier: Apache-2.0
"""Beam search: the most probable whole answers that are found.

Of each request m beams go on and m have ended; a score is the sum of
log-probabilities over length ** length_penalty. Semantics (what counts as
ended, when a request is done) are those of `transformers`' `num_beams`.

A beam is a sequence of the engine, in a slot of its own, read and continued by
the engine's prefill and decode step. Where several beams continue the same one,
its slot is copied into those of beams that nothing continues.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.core.types import Array
from moepeft.inference.api import Request
from moepeft.inference.engine import sampler
from moepeft.inference.engine import sequence as sequences
from moepeft.inference.engine.calls import RetryLater
from moepeft.inference.engine.decode_step import decode_step
from moepeft.inference.engine.engine_core import EngineCore
from moepeft.inference.engine.limits import check_request_length

# Below every sum of log-probabilities, and finite, so that it adds up.
_NEVER = np.float32(-1e9)


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """Settings of a beam search.

  Attributes:
    count: m.
    length_penalty: 0 compares sums; the greater, the longer the answers.
    early_stopping: whether a request is done as soon as m of its beams have
      ended; else it goes on while a better one seems possible, or, with
      'never', until no better one is.
  """

  count: int
  length_penalty: float = 1.0
  early_stopping: bool | str = False

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f'beams is at least 1; got {self.count}')
    if self.early_stopping not in (True, False, 'never'):
      raise ValueError(
        f"early_stopping is True, False or 'never'; got {self.early_stopping!r}"
      )


@dataclasses.dataclass(frozen=True)
class BeamAnswer:
  """An answer that a search has found.

  Attributes:
    ids: its tokens; the last one ends it, or it was cut at max_new_tokens.
    score: the sum of log-probabilities over length ** length_penalty.
  """

  ids: list[int]
  score: float


def search(
  core: EngineCore, requests: Sequence[Request], beams: BeamConfig
) -> list[list[BeamAnswer]]:
  """The m best answers to each request, best first.

  Args:
    core: of an idle engine with at least m slots.

  Raises:
    RetryLater: a sequence runs.
    RequestRefused: a request does not fit.
    ArithmeticError: the model's logits are no numbers.
  """
  if core.scheduler.busy:
    raise RetryLater
  waiting = collections.deque(BeamSearch(r, beams) for r in requests)
  searches, active = [*waiting], []
  try:
    while waiting or active:
      while waiting and core.scheduler.slots.free() >= beams.count:
        active.append(waiting.popleft())
        active[-1].start(core)
      _step(core, active)
      for done in [search for search in active if search.done]:
        active.remove(done)
        done.free(core)
  finally:
    for unfinished in active:
      unfinished.free(core, clear=True)
  return [search.finished for search in searches]


def _step(core: EngineCore, active: 'list[BeamSearch]') -> None:
  """Adds a token to every beam of every search."""
  batch = [row for search in active for row in search.rows]
  output = decode_step(core.runner, core.prefill, batch)
  count = max(search.candidates for search in active)
  ids, logprobs, finite = jax.device_get(
    (*_candidates(output.logits, count), output.finite)
  )
  if not finite[: len(batch)].all():
    raise ArithmeticError(sampler.NOT_FINITE)
  for row in batch:
    core.prefill.record_step(row)
  at = 0
  for search in active:
    rows = slice(at, at + len(search.rows))
    search.grow(core, ids[rows], logprobs[rows])
    at = rows.stop


@functools.partial(jax.jit, static_argnames='count')
def _candidates(logits: tuple[Array, ...], count: int) -> tuple[Array, Array]:
  """(ids, log-probabilities) of each row's best tokens, [n, count]."""
  rows = jnp.concatenate(logits)
  return sampler.best(rows, min(count, rows.shape[1]))


class BeamSearch:
  """The search for the answers to one request.

  Attributes:
    rows: its m beams that go on, the best first; [] before `start`.
    sums: float32 [m], the sums of their log-probabilities.
    finished: the best answers so far, at most m, best first.
    done: whether nothing better is looked for.
  """

  def __init__(self, request: Request, beams: BeamConfig):
    self._request, self._beams = request, beams
    # All beams are the same at first: only one goes on.
    self.sums = np.full(beams.count, _NEVER)
    self.sums[0] = 0
    self.rows: list[sequences.Sequence] = []
    self.finished: list[BeamAnswer] = []
    self.done = False

  @property
  def candidates(self) -> int:
    """So many continuations that m of them go on, whatever the rest ends
    with."""
    return max(2, 1 + len(self._request.eos_token_ids)) * self._beams.count

  def start(self, core: EngineCore) -> None:
    """Reads the prompt into m slots."""
    runner, request = core.runner, self._request
    adapter = runner.adapters.acquire(request.adapter)
    check_request_length(
      request, runner.model, runner.config, len(adapter.soft_prompt_ids)
    )
    for _ in range(self._beams.count):
      row = sequences.Sequence(request, lambda event: None)
      row.use(adapter)
      core.prefill.begin(row)
      self.rows.append(row)
      while not row.prefilled:
        core.prefill.read([row])

  def free(self, core: EngineCore, clear: bool = False) -> None:
    """Frees the slots.

    Args:
      clear: whether they may hold what is no number.
    """
    for row in self.rows:
      if clear:
        row.slot.ids = []
        core.runner.clear(row.slot.number)
      core.scheduler.slots.release(row.slot)
    if self.rows:
      core.runner.adapters.release(self.rows[0].adapter)
    self.rows = []

  def grow(
    self, core: EngineCore, ids: np.ndarray, logprobs: np.ndarray
  ) -> None:
    """Adds a token to every beam.

    Args:
      ids, logprobs: [m, c], each beam's most probable tokens.
    """
    m, request = self._beams.count, self._request
    sums = (self.sums[:, None] + logprobs).reshape(-1)
    order = np.argsort(-sums, kind='stable')[: self.candidates]
    sums, tokens = sums[order], ids.reshape(-1)[order].tolist()
    parents = (order // ids.shape[1]).tolist()
    answers = [
      [*self.rows[parent].answer, token]
      for parent, token in zip(parents, tokens, strict=True)
    ]
    count = len(answers[0])
    ended = np.isin(tokens, request.eos_token_ids)
    ended |= count >= request.max_new_tokens
    # Worse candidates are there to go on only.
    self._finish(answers[:m], sums[:m], ended[:m])
    going_on = np.where(ended, sums + _NEVER, sums)
    best = np.argsort(-going_on, kind='stable')[:m]
    self.sums = going_on[best]
    at_once = self._beams.early_stopping is True
    enough = at_once and len(self.finished) == m
    self.done = enough or ended.all() or not self._may_improve(count)
    if not self.done:
      self._continue(
        core, [parents[i] for i in best], [answers[i] for i in best]
      )

  def _finish(self, answers: list, sums: np.ndarray, ended: np.ndarray) -> None:
    """Puts the answers that have ended among the m best."""
    scores = sums / self._length_factor(len(answers[0]))
    self.finished += [
      BeamAnswer(answer, float(score))
      for answer, score, end in zip(answers, scores, ended, strict=True)
      if end
    ]
    self.finished.sort(key=lambda answer: -answer.score)
    del self.finished[self._beams.count :]

  def _length_factor(self, count: int) -> np.float32:
    return np.float32(count) ** np.float32(self._beams.length_penalty)

  def _may_improve(self, count: int) -> bool:
    """Whether a beam that goes on may become better than the m that ended."""
    beams = self._beams
    longest = beams.early_stopping == 'never' and beams.length_penalty > 0
    size = self._request.max_new_tokens if longest else count
    full = len(self.finished) == beams.count
    worst = self.finished[-1].score if full else _NEVER
    return bool(self.sums[0] / self._length_factor(size) > worst)

  def _continue(
    self, core: EngineCore, parents: list[int], answers: list[list[int]]
  ) -> None:
    """Gives each new beam its parent's slot, or a copy of it."""
    unused = [row for i, row in enumerate(self.rows) if i not in parents]
    rows, used = [], set()
    for parent, answer in zip(parents, answers, strict=True):
      row = source = self.rows[parent]
      if parent in used:
        row = unused.pop()
        core.runner.copy(source.slot.number, row.slot.number)
        row.slot.ids = list(source.slot.ids)
      used.add(parent)
      row.answer = answer
      rows.append(row)
    self.rows = rows
