# SPDX-License-Identifier: Apache-2.0
"""Rank classification, as in T0 and the paper: the likeliest choice wins.

A choice's score is the sum of its tokens' log-probabilities, EOS included,
not normalised by length; ties go to the first.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft import sharding
from moepeft.data import batching
from moepeft.data.vocabulary import Vocabulary
from moepeft.models.t5 import context
from moepeft.objectives.seq2seq import sequence_log_likelihood, shift_right
from moepeft.tasks import Example
from moepeft.typing import Array, Batch, Tree


def score_choices(
  model: Any, variables: Tree, batch: Batch, targets: Array, mask: Array
) -> Array:
  """Log-likelihoods [b, c] of c choices for each input.

  The encoder runs once for an input and is shared by its choices.

  Args:
    batch: inputs [b, s] and inputs_mask.
    targets: int [b, c, t]; mask: bool of the same shape.
  """
  b, c, t = targets.shape
  bound = model.bind(variables)
  source_ctx = context(batch, 'inputs', batch['inputs'], train=False)
  encoded = bound.encode(batch['inputs'], source_ctx)
  repeat = functools.partial(jnp.repeat, repeats=c, axis=0)
  flat, real = targets.reshape(b * c, t), mask.reshape(b * c, t)
  ctx = source_ctx.replace(token_mask=real)
  source_ctx = jax.tree.map(repeat, source_ctx)
  logits = bound.decode(shift_right(flat), ctx, repeat(encoded), source_ctx)
  return sequence_log_likelihood(logits, flat, real).reshape(b, c)


class Ranker:
  """Ranks examples with one compiled program a shape.

  Lengths and the number of choices are rounded up to powers of two and rows to
  `batch_size`, so that few shapes occur.
  """

  def __init__(
    self,
    model: Any,
    vocabulary: Vocabulary,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    mesh: Mesh | None = None,
  ):
    """`batch_size` is rounded up to a multiple of the mesh's devices."""
    self._score = jax.jit(functools.partial(score_choices, model))
    self._vocabulary = vocabulary
    self._lengths = inputs_length, targets_length
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._batch_size = sharding.round_up(self._mesh, batch_size)

  def look(self, row: Example) -> tuple[bool, bool]:
    """(whether its input or a choice is cut, whether two choices are one).

    Choices may be the same to the tokenizer, or in what is left after a cut;
    such an example cannot be ranked.
    """
    _, choices, cut = self._encode(row)
    return cut, len(set(map(tuple, choices))) < len(choices)

  def predict(self, variables: Tree, rows: Sequence[Example]) -> np.ndarray:
    """The place of the likeliest choice of each example: int [rows]."""
    encoded = [self._encode(row) for row in rows]
    groups = collections.defaultdict(list)
    for i, (x, choices, _) in enumerate(encoded):
      inputs, targets = self._lengths
      shape = (
        _round(len(choices), 2, 1 << 30),
        _round(len(x), 64, inputs),
        _round(max(map(len, choices)), 16, targets),
      )
      groups[shape].append(i)
    predicted = np.zeros(len(rows), np.int64)
    for (count, s, t), members in sorted(groups.items()):
      for at in range(0, len(members), self._batch_size):
        part = members[at : at + self._batch_size]
        scores = self._scores(variables, encoded, part, count, s, t)
        for i, row in zip(part, scores, strict=False):
          predicted[i] = np.argmax(row[: len(rows[i].choices)])
    return predicted

  def _scores(self, variables, encoded, part, count, s, t) -> np.ndarray:
    # Whole batches, and as many choices each, by repeating the last.
    filled = part + [part[-1]] * (self._batch_size - len(part))
    inputs = [encoded[i][0] for i in filled]
    choices = []
    for i in filled:
      own = encoded[i][1]
      choices += own + [own[-1]] * (count - len(own))
    arrays = batching.seq2seq(inputs, inputs, s, s)
    answers = batching.seq2seq(choices, choices, t, t)
    shape = (len(filled), count, t)
    batch = {key: arrays[key] for key in ('inputs', 'inputs_mask')}
    batch |= {
      key: answers[key].reshape(shape) for key in ('targets', 'targets_mask')
    }
    batch = sharding.shard_whole_batch(self._mesh, batch)
    targets, mask = batch.pop('targets'), batch.pop('targets_mask')
    return sharding.gather(self._score(variables, batch, targets, mask))

  def _encode(self, row: Example) -> tuple[list[int], list[list[int]], bool]:
    inputs, targets = self._lengths
    x, short = batching.cut(self._vocabulary, row.inputs, inputs)
    choices = []
    for choice in row.choices:
      y, cut = batching.cut(self._vocabulary, choice, targets)
      short |= cut
      choices.append(y)
    return x, choices, short


def _round(length: int, least: int, most: int) -> int:
  return min(max(least, 1 << (length - 1).bit_length()), most)
