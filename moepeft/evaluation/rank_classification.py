# SPDX-License-Identifier: Apache-2.0
"""Rank classification, as in T0 and the paper: the likeliest choice wins.

A choice's score is the sum of its tokens' log-probabilities, EOS included,
not normalised by length; ties go to the first.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.types import Array, Batch, Context, Tree
from moepeft.data.batching import decoder_only as batching_decoder_only
from moepeft.data.batching import packing, seq2seq
from moepeft.data.batching.task_ids import add_task_ids, task_id
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos
from moepeft.models import decoder_only
from moepeft.models.sites import context
from moepeft.moe.task_names import model_task_names
from moepeft.objectives.cross_entropy import sequence_log_likelihood
from moepeft.peft.prefix import model_prefix_ids
from moepeft.tasks import Example

# Inputs are padded to a multiple of this, from 4 times it on to a power of two.
_INPUTS = 64
# The least length that choices are padded to.
_TARGETS = 4
# Short rows go into batches of at most so many times the rows.
_MORE = 8
# Choices of as many tokens as there may be that `batch_size` has room for.
_CHOICES = 4


def score_choices(
  model: Any, variables: Tree, batch: Batch, targets: Array, mask: Array
) -> Array:
  """Log-likelihoods [b, c] of c choices for each input.

  The encoder runs once for an input, and so do the keys and values that
  cross-attention makes of it: its choices are one row of the decoder, packed,
  each a segment that sees itself alone.

  Args:
    batch: inputs [b, s] and inputs_mask.
    targets: int [b, c, t]; mask: bool of the same shape.
  """
  b, c, t = targets.shape
  if decoder_only(model):
    return _score_in_rows(model, variables, batch, targets, mask)
  bound = model.bind(variables)
  source_ctx = context(batch, 'inputs', batch['inputs'], train=False)
  encoded = bound.encode(batch['inputs'], source_ctx)
  row = functools.partial(jnp.reshape, shape=(b, c * t))
  numbers = jnp.broadcast_to(jnp.arange(c)[:, None], targets.shape)
  task_ids = batch.get('inputs_tasks')
  if task_ids is not None:
    # That of the row's first token, which is real.
    task_ids = row(jnp.broadcast_to(task_ids[:, :1, None], mask.shape))
  ctx = source_ctx.replace(
    token_mask=row(mask),
    task_ids=task_ids,
    # The token that a choice begins with.
    prompt_mask=row(jnp.broadcast_to(jnp.arange(t) == 0, mask.shape)),
    segment_ids=row(numbers),
  )
  logits = bound.decode(row(shift_right(targets)), ctx, encoded, source_ctx)
  logits = logits.reshape(b * c, t, -1)
  flat, real = targets.reshape(b * c, t), mask.reshape(b * c, t)
  return sequence_log_likelihood(logits, flat, real).reshape(b, c)


def _score_in_rows(
  model: Any, variables: Tree, batch: Batch, targets: Array, mask: Array
) -> Array:
  """`score_choices` of a decoder: a row for each prompt and choice.

  Prompts are moved to the end of their [s], so that a choice follows at once
  and tokens stand as far apart as in training.
  """
  b, c, t = targets.shape
  real = batch['inputs_mask']
  s = real.shape[1]
  short = s - jnp.sum(real, axis=1, keepdims=True)
  moved = (jnp.arange(s) - short) % s
  prompt, prompt_mask = (
    jnp.repeat(jnp.take_along_axis(a, moved, axis=1), c, axis=0)
    for a in (batch['inputs'], real)
  )
  flat, scored = targets.reshape(b * c, t), mask.reshape(b * c, t)
  ids = jnp.concatenate([prompt, flat], axis=1)[:, :-1]
  places = jnp.arange(ids.shape[1]) - jnp.repeat(short, c, axis=0)
  task_ids = batch.get('inputs_tasks')
  if task_ids is not None:
    first = jnp.repeat(task_ids[:, :1], c, axis=0)
    task_ids = jnp.broadcast_to(first, ids.shape)
  ctx = Context(
    token_mask=jnp.concatenate([prompt_mask, scored], axis=1)[:, :-1],
    prompt_mask=jnp.concatenate([prompt_mask, jnp.zeros_like(scored)], axis=1)[
      :, :-1
    ],
    task_ids=task_ids,
    positions=jnp.maximum(places, 0),
  )
  bound = model.bind(variables)
  # The prompt's last token and the choice's all but last say its logits.
  states = bound.states(ids, ctx)[:, s - 1 :]
  ctx = ctx.replace(
    token_mask=ctx.token_mask[:, s - 1 :], positions=ctx.positions[:, s - 1 :]
  )
  tied = bound.embed if model.config.tied else None
  logits = bound.head(states, ctx, tied)
  return sequence_log_likelihood(logits, flat, scored).reshape(b, c)


@dataclasses.dataclass(frozen=True)
class Ranked:
  """An example as ids.

  Attributes:
    inputs: int [s], with EOS; of a decoder what its answers follow.
    choices: int [t] each, with EOS.
    cut: whether the input or a choice is cut.
    task: see `batching.task_ids`.
  """

  inputs: Sequence[int]
  choices: tuple[Sequence[int], ...]
  cut: bool
  task: int = 0

  @property
  def alike(self) -> bool:
    """Whether two choices are one, so that it cannot be ranked.

    They may be the same to the tokenizer, or in what is left after a cut.
    """
    return len({tuple(ids) for ids in self.choices}) < len(self.choices)


def shift_right(targets: Array) -> Array:
  """Decoder inputs of targets [..., t]: the id 0, then all but the last."""
  widths = [(0, 0)] * (targets.ndim - 1) + [(1, 0)]
  return jnp.pad(targets[..., :-1], widths)


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
  """A batch: `shape` is (rows, choices, inputs, targets)."""

  shape: tuple[int, int, int, int]
  members: tuple[int, ...]


class NotFinite(ValueError):
  """Scores of which none is the greatest: the weights are not finite."""


class Ranker:
  """Ranks examples with one compiled program a shape.

  Rows of like lengths share a batch, and lengths are rounded, so that there is
  little padding and few shapes occur.
  """

  def __init__(
    self,
    model: Any,
    vocabulary: Tokenizer,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    mesh: Mesh | None = None,
  ):
    """`batch_size` is of the longest rows; there are more of short ones.

    It is rounded up to a multiple of the mesh's devices.
    """
    self._score = jax.jit(functools.partial(score_choices, model))
    self._causal, self._before = decoder_only(model), model_prefix_ids(model)
    self._tasks = model_task_names(model)
    self._vocabulary = vocabulary
    self._lengths = inputs_length, targets_length
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._batch_size = sharding.round_up(self._mesh, batch_size)

  def prepare(self, rows: Sequence[Example]) -> list[Ranked]:
    """Examples as ids; every different text is tokenized once."""
    inputs, targets = self._lengths
    inputs = packing.length_after_prefix(inputs, self._before, 'the inputs')
    texts = {row.inputs for row in rows}
    sources = (
      self._prompts(texts, inputs) if self._causal else self._ids(texts, inputs)
    )
    answers = self._ids({text for row in rows for text in row.choices}, targets)
    prepared = []
    for row in rows:
      x, short = sources[row.inputs]
      choices, cuts = zip(*[answers[c] for c in row.choices], strict=True)
      x = packing.prepend(self._before, x)
      task = task_id(self._tasks, row.task)
      prepared.append(Ranked(x, choices, short or any(cuts), task))
    return prepared

  def scores(
    self,
    variables: Tree,
    rows: Sequence[Ranked],
    progress: Callable[[int], None] = lambda done: None,
  ) -> list[np.ndarray]:
    """The log-likelihood of every choice of each example: float32 [choices].

    Args:
      progress: told how many more examples are done.
    """
    by_row: list = [None] * len(rows)
    for part in self.parts(rows):
      scores = self._scores(variables, [rows[i] for i in part.members], part)
      for i, row in zip(part.members, scores, strict=False):
        by_row[i] = row[: len(rows[i].choices)]
      progress(len(part.members))
    return by_row

  def predict(
    self,
    variables: Tree,
    rows: Sequence[Ranked],
    progress: Callable[[int], None] = lambda done: None,
  ) -> np.ndarray:
    """The place of the likeliest choice of each example: int [rows].

    Raises:
      NotFinite: a score is no finite number, and would pass for the first.
    """
    scores = self.scores(variables, rows, progress)
    wrong = sum(not np.all(np.isfinite(row_scores)) for row_scores in scores)
    if wrong:
      raise NotFinite(
        f'{wrong} of {len(rows)} ranked examples have scores that are not '
        'finite: the run has diverged or its weights are not finite; take an '
        'earlier checkpoint (--checkpoint=STEP), or train again with a lower '
        'learning rate'
      )
    return np.array([np.argmax(row_scores) for row_scores in scores], np.int64)

  def parts(self, rows: Sequence[Ranked]) -> Iterator[ScoringBatch]:
    """The batches that rows are ranked in, of as few shapes as may be.

    From the longest on, a batch takes the next rows, shorter ones too where
    those of its shape have run out; so of each number of choices only the
    last batch is not full.
    """
    sizes = [self._size(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: sizes[i], reverse=True)
    while order:
      c, s, t = sizes[order[0]]
      near = [i for i in order[: self._rows(c, s, t)] if sizes[i][0] == c]
      # Rows of shorter inputs may have longer choices.
      t = max(sizes[i][2] for i in near)
      count = self._rows(c, s, t)
      if len(near) < count:
        # No more have as many choices: a smaller batch will do.
        least = sharding.round_up(self._mesh, _power(len(near)))
        count = min(count, least)
      yield ScoringBatch((count, c, s, t), tuple(near[:count]))
      order = order[len(near[:count]) :]

  def _size(self, row: Ranked) -> tuple[int, int, int]:
    """(choices, inputs, targets), as they are rounded."""
    inputs, targets = self._lengths
    count = len(row.choices)
    s = -(-len(row.inputs) // _INPUTS) * _INPUTS
    t = _power(max(map(len, row.choices)))
    return (
      count if count <= 4 else _power(count),
      min(s if s <= 4 * _INPUTS else _power(s), inputs),
      min(max(t, _TARGETS), targets),
    )

  def _rows(self, c: int, s: int, t: int) -> int:
    """Rows of a batch: its arrays are no larger than those of the longest,
    whose choices are `_CHOICES`.
    """
    inputs, targets = self._lengths
    room = _CHOICES * targets
    if c * t > room:
      least = max(1, self._batch_size * room // (c * t))
      return sharding.round_up(self._mesh, least)
    more = min(inputs // s, targets // t, room // (c * t), _MORE)
    return self._batch_size * (_power(more + 1) // 2)

  def _scores(
    self, variables, rows: list[Ranked], part: ScoringBatch
  ) -> np.ndarray:
    count, c, s, t = part.shape
    # Whole batches, and as many choices each, by repeating the last.
    filled = rows + [rows[-1]] * (count - len(rows))
    choices = []
    for row in filled:
      choices += [*row.choices, *[row.choices[-1]] * (c - len(row.choices))]
    inputs = [row.inputs for row in filled]
    arrays = seq2seq.pad_pairs(inputs, inputs, s, s)
    answers = seq2seq.pad_pairs(choices, choices, t, t)
    tasks = [row.task for row in filled]
    arrays = add_task_ids(arrays, self._tasks, tasks)
    keys = ('inputs', 'inputs_mask', 'inputs_tasks')
    batch = {key: arrays[key] for key in keys if key in arrays}
    batch |= {
      key: answers[key].reshape(count, c, t)
      for key in ('targets', 'targets_mask')
    }
    batch = sharding.shard_whole_batch(self._mesh, batch)
    targets, mask = batch.pop('targets'), batch.pop('targets_mask')
    return sharding.gather(self._score(variables, batch, targets, mask))

  def _ids(
    self, texts: set[str], length: int
  ) -> dict[str, tuple[list[int], bool]]:
    """{text: (ids with EOS, whether its end was cut to `length` for it)}."""
    end = [require_eos(self._vocabulary)]
    ordered = sorted(texts)
    every = map(list, self._vocabulary.encode_all(ordered)) if ordered else ()
    return {
      text: (ids[: length - 1] + end, len(ids) >= length)
      for text, ids in zip(ordered, every, strict=True)
    }

  def _prompts(
    self, texts: set[str], length: int
  ) -> dict[str, tuple[list[int], bool]]:
    """{text: (ids as in training, whether its beginning was cut)}."""
    ordered = sorted(texts)
    every = batching_decoder_only.encode_prompts(self._vocabulary, ordered)
    bos = self._vocabulary.bos
    return {
      text: (
        list(batching_decoder_only.keep_last(ids, length, bos)),
        len(ids) > length,
      )
      for text, ids in zip(ordered, every, strict=True)
    }


def _power(length: int) -> int:
  """The least power of two that is not below a length."""
  return 1 << (length - 1).bit_length()
