# SPDX-License-Identifier: Apache-2.0
"""Beam search, with the semantics of `transformers`' `num_beams`.

Each request has m running beams and up to m finished answers. A score is the
sum of log-probabilities divided by length ** length_penalty.

A running beam is a sequence in an engine slot, computed by the engine's prefill
and decode step. If several beams continue the same one, its slot is copied into
the slots of beams that are dropped.
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

# Below every sum of log-probabilities, but finite so that sums stay finite.
_MIN_SCORE = np.float32(-1e9)


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """Settings of a beam search.

  Attributes:
    count: the number of beams, m.
    length_penalty: exponent of the length in scores; 0 compares the sums, and
      greater values favor longer answers.
    early_stopping: True stops a request when m answers have finished; False
      stops when the best running beam scores below them at its present length;
      'never' stops when it would at every length.
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
  """An answer found by beam search.

  Attributes:
    ids: its tokens, up to an eos token or max_new_tokens.
    score: the sum of log-probabilities divided by length ** length_penalty.
  """

  ids: list[int]
  score: float


def search(
  core: EngineCore, requests: Sequence[Request], beams: BeamConfig
) -> list[list[BeamAnswer]]:
  """Searches the m best answers to each request, best first.

  Args:
    core: the core of an engine with at least m slots.

  Raises:
    RetryLater: a sequence is waiting or running.
    RequestRefused: a prompt and its answer do not fit.
    ArithmeticError: the model's logits are NaN or infinite.
  """
  if core.scheduler.has_unfinished:
    raise RetryLater
  waiting = collections.deque(BeamSearch(r, beams) for r in requests)
  searches, active = [*waiting], []
  try:
    while waiting or active:
      while waiting and core.scheduler.prefix_cache.free() >= beams.count:
        active.append(waiting.popleft())
        active[-1].start(core)
      _step(core, active)
      for done in [search for search in active if search.done]:
        active.remove(done)
        done.free(core)
  finally:
    for search in active:
      search.free(core, clear=True)
  return [search.finished for search in searches]


def _step(core: EngineCore, active: 'list[BeamSearch]') -> None:
  """Adds a token to every beam of every search."""
  batch = [row for search in active for row in search.rows]
  output = decode_step(core.runner, core.prefill, batch, [()] * len(batch))
  count = max(search.candidates for search in active)
  ids, logprobs, finite = jax.device_get(
    (*_candidates(output.logits, count), output.finite)
  )
  if not finite[: len(batch)].all():
    raise ArithmeticError(sampler.NOT_FINITE)
  for row in batch:
    core.prefill.record_cached_token(row)
  first_row = 0
  for search in active:
    rows = slice(first_row, first_row + len(search.rows))
    search.advance(core, ids[rows], logprobs[rows])
    first_row = rows.stop


@functools.partial(jax.jit, static_argnames='count')
def _candidates(logits: tuple[Array, ...], count: int) -> tuple[Array, Array]:
  """Each row's `count` most probable (ids, log-probabilities), [n, count]."""
  rows = jnp.concatenate(logits)
  return sampler.top_tokens(rows, min(count, rows.shape[1]))


class BeamSearch:
  """The search for the answers to one request.

  Attributes:
    rows: the m running beams, best first; [] before `start`.
    sums: float32 [m], the running beams' sums of log-probabilities.
    finished: the best finished answers, at most m, best first.
    done: whether the search has ended.
  """

  def __init__(self, request: Request, beams: BeamConfig):
    self._request, self._beams = request, beams
    # All beams are equal at first, so only the first may be continued.
    self.sums = np.full(beams.count, _MIN_SCORE)
    self.sums[0] = 0
    self.rows: list[sequences.Sequence] = []
    self.finished: list[BeamAnswer] = []
    self.done = False

  @property
  def candidates(self) -> int:
    """The number of continuations to rank, so that m of them do not end."""
    return max(2, 1 + len(self._request.eos_token_ids)) * self._beams.count

  def start(self, core: EngineCore) -> None:
    """Prefills the prompt into m slots."""
    runner, request = core.runner, self._request
    adapter = runner.adapters.acquire(request.adapter)
    check_request_length(
      request, runner.model, runner.config, len(adapter.soft_prompt_ids)
    )
    for _ in range(self._beams.count):
      row = sequences.Sequence(request, lambda event: None)
      row.set_adapter(adapter)
      core.prefill.assign_slot(row)
      self.rows.append(row)
      while not row.prefilled:
        core.prefill.read_chunk([row])

  def free(self, core: EngineCore, clear: bool = False) -> None:
    """Frees the slots.

    Args:
      clear: whether their caches may contain NaN.
    """
    for row in self.rows:
      if clear:
        row.slot.ids = []
        core.runner.clear_slot(row.slot.number)
      core.scheduler.prefix_cache.release(row.slot)
    if self.rows:
      core.runner.adapters.release(self.rows[0].adapter)
    self.rows = []

  def advance(
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
    # As in `transformers`, only the m best candidates may finish.
    self._finish(answers[:m], sums[:m], ended[:m])
    unfinished_sums = np.where(ended, sums + _MIN_SCORE, sums)
    best = np.argsort(-unfinished_sums, kind='stable')[:m]
    self.sums = unfinished_sums[best]
    stop_early = self._beams.early_stopping is True
    has_enough = stop_early and len(self.finished) == m
    self.done = has_enough or ended.all() or not self._may_improve(count)
    if not self.done:
      self._assign_slots(
        core, [parents[i] for i in best], [answers[i] for i in best]
      )

  def _finish(self, answers: list, sums: np.ndarray, ended: np.ndarray) -> None:
    """Adds the ended answers to the m best."""
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
    """Whether a running beam may still beat the m finished answers."""
    beams = self._beams
    assume_longest = (
      beams.early_stopping == 'never' and beams.length_penalty > 0
    )
    size = self._request.max_new_tokens if assume_longest else count
    full = len(self.finished) == beams.count
    worst = self.finished[-1].score if full else _MIN_SCORE
    return bool(self.sums[0] / self._length_factor(size) > worst)

  def _assign_slots(
    self, core: EngineCore, parents: list[int], answers: list[list[int]]
  ) -> None:
    """Gives each new beam the slot of its parent, or a copy of that slot."""
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
