# SPDX-License-Identifier: Apache-2.0
"""Rank classification predicts the choice that the model finds most likely.

The definition is that of T0 (arXiv:2110.08207) and arXiv:2309.05444. A choice's
score is the sum of the log-probabilities of its tokens and EOS, without length
normalization; the first of equal scores wins.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import (
  Callable,
  Collection,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.types import Array, Batch, Context, Tree
from moepeft.data.batching import decoder_only as batching_decoder_only
from moepeft.data.batching import packing, seq2seq
from moepeft.data.batching.router_inputs import (
  NO_INPUTS,
  ExampleInputs,
  RouterInputs,
)
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos
from moepeft.models import decoder_only
from moepeft.models.sites import context
from moepeft.objectives.cross_entropy import sequence_log_likelihood
from moepeft.peft.prefix import model_prefix_ids
from moepeft.tasks import Example

# Inputs are padded to a multiple of this, and above 4 times this to a power of
# two.
_INPUTS_MULTIPLE = 64
# Choices are padded to at least this length.
_MIN_TARGETS_LENGTH = 8
# A batch of short rows has at most this many times `batch_size` rows.
_MAX_ROW_FACTOR = 8
# A batch of `batch_size` rows is full if each row has this many choices of
# `targets_length` tokens.
_NOMINAL_CHOICES = 4
# Compiling a program takes as long as so many operations, about 2 s on two CPU
# cores. An accelerator does more in that time.
_COMPILATION_FLOPS = 2e11

# (choices, inputs length, targets length) of rows.
RowShape = tuple[int, int, int]


def score_choices(
  model: Any, variables: Tree, batch: Batch, targets: Array, mask: Array
) -> Array:
  """Log-likelihoods [b, c] of c choices for each input.

  The encoder and the keys and values of cross-attention are computed once per
  input: the choices of an input are packed into one row of the decoder, each as
  a segment that attends only to itself.

  Args:
    batch: inputs [b, s] and inputs_mask.
    targets: int [b, c, t]; mask: bool of the same shape.
  """
  b, c, t = targets.shape
  if decoder_only(model):
    return _score_decoder_only(model, variables, batch, targets, mask)
  bound = model.bind(variables)
  source_ctx = context(batch, 'inputs', batch['inputs'], train=False)
  # The batch has no decoder inputs to tell that its inputs are prompts.
  source_ctx = source_ctx.replace(prompt_mask=source_ctx.token_mask)
  encoded = bound.encode(batch['inputs'], source_ctx)
  pack = functools.partial(jnp.reshape, shape=(b, c * t))
  # From 1, as 0 is padding.
  segment_ids = jnp.broadcast_to(1 + jnp.arange(c)[:, None], targets.shape)
  task_ids = batch.get('inputs_tasks')
  if task_ids is not None:
    # That of the row's first token, which is no padding.
    task_ids = pack(jnp.broadcast_to(task_ids[:, :1, None], mask.shape))
  ctx = source_ctx.replace(
    token_mask=pack(mask),
    task_ids=task_ids,
    # The first decoder input of each choice.
    prompt_mask=pack(jnp.broadcast_to(jnp.arange(t) == 0, mask.shape)),
    segment_ids=pack(segment_ids),
    embeddings=_each_choice(batch, c, axis=1),
  )
  logits = bound.decode(pack(shift_right(targets)), ctx, encoded, source_ctx)
  logits = logits.reshape(b * c, t, -1)
  flat_targets, flat_mask = targets.reshape(b * c, t), mask.reshape(b * c, t)
  log_likelihoods = sequence_log_likelihood(logits, flat_targets, flat_mask)
  return log_likelihoods.reshape(b, c)


def _score_decoder_only(
  model: Any, variables: Tree, batch: Batch, targets: Array, mask: Array
) -> Array:
  """`score_choices` for a decoder-only model, with one row per choice.

  Prompts are padded on the left, so that there is no padding between a prompt
  and its choice and positions are those of training.
  """
  b, c, t = targets.shape
  inputs_mask = batch['inputs_mask']
  s = inputs_mask.shape[1]
  num_padding = s - jnp.sum(inputs_mask, axis=1, keepdims=True)
  source_indices = (jnp.arange(s) - num_padding) % s
  prompt, prompt_mask = (
    jnp.repeat(jnp.take_along_axis(a, source_indices, axis=1), c, axis=0)
    for a in (batch['inputs'], inputs_mask)
  )
  flat_targets, flat_mask = targets.reshape(b * c, t), mask.reshape(b * c, t)
  ids = jnp.concatenate([prompt, flat_targets], axis=1)[:, :-1]
  positions = jnp.arange(ids.shape[1]) - jnp.repeat(num_padding, c, axis=0)
  task_ids = batch.get('inputs_tasks')
  if task_ids is not None:
    first = jnp.repeat(task_ids[:, :1], c, axis=0)
    task_ids = jnp.broadcast_to(first, ids.shape)
  ctx = Context(
    token_mask=jnp.concatenate([prompt_mask, flat_mask], axis=1)[:, :-1],
    prompt_mask=jnp.concatenate(
      [prompt_mask, jnp.zeros_like(flat_mask)], axis=1
    )[:, :-1],
    task_ids=task_ids,
    positions=jnp.maximum(positions, 0),
    embeddings=_each_choice(batch, c, axis=0),
  )
  bound = model.bind(variables)
  # A token is predicted by the state before it: the first token of a choice by
  # the last state of the prompt.
  states = bound.states(ids, ctx)[:, s - 1 :]
  ctx = ctx.replace(
    token_mask=ctx.token_mask[:, s - 1 :], positions=ctx.positions[:, s - 1 :]
  )
  tied = bound.embed if model.config.tied else None
  logits = bound.head(states, ctx, tied)
  log_likelihoods = sequence_log_likelihood(logits, flat_targets, flat_mask)
  return log_likelihoods.reshape(b, c)


def _each_choice(batch: Batch, c: int, axis: int) -> Array | None:
  """The embeddings [b, 1, i] of a batch, if it has some, for c choices."""
  embeddings = batch.get('embeddings')
  return None if embeddings is None else jnp.repeat(embeddings, c, axis)


@dataclasses.dataclass(frozen=True)
class EncodedExample:
  """A tokenized example.

  Attributes:
    inputs: int [s], with EOS; for a decoder-only model the prompt, without EOS.
    choices: int [t] each, with EOS.
    cut: whether the input or a choice is truncated.
    routed_by: what routers read of the example.
  """

  inputs: Sequence[int]
  choices: tuple[Sequence[int], ...]
  cut: bool
  routed_by: ExampleInputs = NO_INPUTS

  @property
  def has_equal_choices(self) -> bool:
    """Whether two choices have the same ids, so that they cannot be ranked.

    The texts may differ: the tokenizer or truncation can make them equal.
    """
    return len({tuple(ids) for ids in self.choices}) < len(self.choices)


def shift_right(targets: Array) -> Array:
  """Decoder inputs of targets [..., t]: the id 0, then all but the last."""
  widths = [(0, 0)] * (targets.ndim - 1) + [(1, 0)]
  return jnp.pad(targets[..., :-1], widths)


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
  """The plan of a batch.

  Attributes:
    shape: (rows, choices, inputs length, targets length).
    indices: the examples' indices, at most one per row.
  """

  shape: tuple[int, int, int, int]
  indices: tuple[int, ...]


def merge_shapes(
  counts: Mapping[RowShape, int],
  tokens_of: Callable[[RowShape], float],
  program_tokens: float,
  compiled: Collection[RowShape] = (),
) -> dict[RowShape, RowShape]:
  """Pads rows to fewer shapes, where that costs less than more programs.

  Greedy: of all pairs of shapes, the two are merged first that save most.

  Args:
    counts: the number of rows of each shape.
    tokens_of: the tokens of a row of a shape.
    program_tokens: the number of tokens that are computed in the time that a
      program takes to compile.
    compiled: shapes whose programs there are.

  Returns:
    {shape: the shape that its rows are padded to}.
  """
  merged = {shape: shape for shape in counts}
  rows = collections.Counter(counts)
  rows.update(dict.fromkeys(compiled, 0))

  def saving(pair: tuple[RowShape, RowShape]) -> float:
    union = _union(*pair)
    programs = sum(shape not in compiled for shape in pair)
    programs -= union not in compiled
    added = sum(rows[x] * (tokens_of(union) - tokens_of(x)) for x in pair)
    return programs * program_tokens - added

  while len(rows) > 1:
    pair = max(itertools.combinations(rows, 2), key=saving)
    if saving(pair) <= 0:
      break
    union = _union(*pair)
    rows[union] += sum(rows.pop(x) for x in pair if x != union)
    merged = {x: union if y in pair else y for x, y in merged.items()}
  return merged


def _union(a: RowShape, b: RowShape) -> RowShape:
  """The smallest shape that holds rows of both shapes."""
  return tuple(map(max, a, b))


class NonFiniteScoreError(ValueError):
  """A score is NaN or infinite, so that choices cannot be ranked."""


class Ranker:
  """Ranks the choices of examples, with one compiled program per batch shape.

  A batch has examples of similar lengths, which reduces padding. Lengths are
  rounded, which reduces the number of shapes.
  """

  def __init__(
    self,
    model: Any,
    tokenizer: Tokenizer,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    mesh: Mesh | None = None,
  ):
    """
    Args:
      inputs_length, targets_length: the lengths that inputs and choices are
        truncated to.
      batch_size: rows of a batch of the longest examples, rounded up to a
        multiple of the mesh's devices. A batch of short examples has more rows.
      mesh: all devices by default.
    """
    self._score = jax.jit(functools.partial(score_choices, model))
    self._is_decoder_only = decoder_only(model)
    self._prefix_ids = model_prefix_ids(model)
    self._tokenizer = tokenizer
    self._router_inputs = RouterInputs.of_method(model.adapter_map)
    self._lengths = inputs_length, targets_length
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._batch_size = sharding.round_up(self._mesh, batch_size)
    # The shapes of the programs that are compiled, or soon will be.
    self._shapes: set[tuple[int, int, int, int]] = set()

  def share_programs(self, ranker: 'Ranker') -> None:
    """Uses the compiled programs of a ranker of an equal model."""
    self._score = ranker._score

  def prepare(self, examples: Sequence[Example]) -> list[EncodedExample]:
    """Tokenizes examples; each distinct text is tokenized once."""
    inputs_length, targets_length = self._lengths
    inputs_length = packing.length_after_prefix(
      inputs_length, self._prefix_ids, 'the inputs'
    )
    encode_inputs = (
      self._encode_prompts if self._is_decoder_only else self._encode_texts
    )
    inputs = encode_inputs({e.inputs for e in examples}, inputs_length)
    texts = {text for e in examples for text in e.choices}
    targets = self._encode_texts(texts, targets_length)
    encoded = []
    for example in examples:
      ids, is_cut = inputs[example.inputs]
      choices, choices_cut = zip(
        *[targets[c] for c in example.choices], strict=True
      )
      ids = packing.prepend_prefix(self._prefix_ids, ids)
      routed_by = self._router_inputs.of_example(example)
      cut = is_cut or any(choices_cut)
      encoded.append(EncodedExample(ids, choices, cut, routed_by))
    return encoded

  def scores(
    self,
    variables: Tree,
    examples: Sequence[EncodedExample],
    progress: Callable[[int], None] = lambda count: None,
  ) -> list[np.ndarray]:
    """The log-likelihood of every choice of each example: float32 [choices].

    Args:
      progress: called after each batch with its number of examples.
    """
    scores: list = [None] * len(examples)
    parameters = sum(x.size for x in jax.tree.leaves(variables))
    for batch in self.plan_batches(examples, parameters):
      batch_scores = self._score_batch(
        variables, [examples[i] for i in batch.indices], batch.shape
      )
      for i, row_scores in zip(batch.indices, batch_scores, strict=False):
        scores[i] = row_scores[: len(examples[i].choices)]
      progress(len(batch.indices))
    return scores

  def predict(
    self,
    variables: Tree,
    examples: Sequence[EncodedExample],
    progress: Callable[[int], None] = lambda count: None,
  ) -> np.ndarray:
    """The index of the likeliest choice of each example: int [examples].

    Raises:
      NonFiniteScoreError: a score is NaN or infinite.
    """
    scores = self.scores(variables, examples, progress)
    num_bad = sum(not np.all(np.isfinite(s)) for s in scores)
    if num_bad:
      raise NonFiniteScoreError(
        f'{num_bad} of {len(examples)} ranked examples have scores that are '
        'not finite: the run has diverged or its weights are not finite; use '
        'an earlier checkpoint (--checkpoint=STEP), or train again with a '
        'lower learning rate'
      )
    return np.array([np.argmax(s) for s in scores], np.int64)

  def plan_batches(
    self, examples: Sequence[EncodedExample], parameters: int
  ) -> Iterator[ScoringBatch]:
    """Groups examples into batches of few distinct shapes.

    For each shape, only the last batch is not full. It has fewer rows, unless
    there is a program with more.

    Args:
      parameters: of the model, by which more programs are weighed against more
        padding.
    """
    shapes = [self._rounded_shape(example) for example in examples]
    merged = merge_shapes(
      collections.Counter(shapes),
      self._tokens,
      # A forward pass multiplies and adds each parameter once a token.
      _COMPILATION_FLOPS / (2 * parameters),
      {shape[1:] for shape in self._shapes},
    )
    by_shape = collections.defaultdict(list)
    for i, shape in enumerate(shapes):
      by_shape[merged[shape]].append(i)
    for shape in sorted(by_shape, reverse=True):
      max_rows, members = self._num_rows(*shape), by_shape[shape]
      for start in range(0, len(members), max_rows):
        indices = tuple(members[start : start + max_rows])
        batch_shape = (self._program_rows(shape, len(indices)), *shape)
        self._shapes.add(batch_shape)
        yield ScoringBatch(batch_shape, indices)

  def _program_rows(self, shape: RowShape, count: int) -> int:
    """The rows of the smallest program for `count` rows, or of a new one."""
    rows = [x[0] for x in self._shapes if x[1:] == shape and x[0] >= count]
    new = sharding.round_up(self._mesh, _next_power_of_2(count))
    return min(rows, default=min(self._num_rows(*shape), new))

  def _tokens(self, shape: RowShape) -> float:
    """The tokens of a row that pass all parameters."""
    c, s, t = shape
    # An encoder and a decoder have half of the parameters each.
    return c * (s + t) if self._is_decoder_only else (s + c * t) / 2

  def _rounded_shape(self, example: EncodedExample) -> RowShape:
    """(choices, inputs length, targets length), each rounded up."""
    inputs_length, targets_length = self._lengths
    c = len(example.choices)
    s = -(-len(example.inputs) // _INPUTS_MULTIPLE) * _INPUTS_MULTIPLE
    s = s if s <= 4 * _INPUTS_MULTIPLE else _next_power_of_2(s)
    t = _next_power_of_2(max(map(len, example.choices)))
    return (
      c if c <= 4 else _next_power_of_2(c),
      min(s, inputs_length),
      min(max(t, _MIN_TARGETS_LENGTH), targets_length),
    )

  def _num_rows(self, c: int, s: int, t: int) -> int:
    """The number of rows of a batch.

    Arrays are at most as large as in a batch of `batch_size` rows of the
    longest examples with `_NOMINAL_CHOICES` choices.
    """
    inputs_length, targets_length = self._lengths
    max_tokens = _NOMINAL_CHOICES * targets_length
    if c * t > max_tokens:
      num_rows = max(1, self._batch_size * max_tokens // (c * t))
      return sharding.round_up(self._mesh, num_rows)
    factor = min(
      inputs_length // s,
      targets_length // t,
      max_tokens // (c * t),
      _MAX_ROW_FACTOR,
    )
    return self._batch_size * (_next_power_of_2(factor + 1) // 2)

  def _score_batch(
    self,
    variables: Tree,
    examples: list[EncodedExample],
    shape: tuple[int, int, int, int],
  ) -> np.ndarray:
    """Log-likelihoods [rows, choices]; rows after the examples are padding."""
    num_rows, c, s, t = shape
    # The last example and the last choice are repeated as padding.
    padded = examples + [examples[-1]] * (num_rows - len(examples))
    choices = []
    for example in padded:
      choices += example.choices
      choices += [example.choices[-1]] * (c - len(example.choices))
    inputs = [example.inputs for example in padded]
    padded_inputs = seq2seq.pad_pairs(inputs, inputs, s, s)
    padded_choices = seq2seq.pad_pairs(choices, choices, t, t)
    padded_inputs = self._router_inputs.add(
      padded_inputs, [example.routed_by for example in padded]
    )
    keys = ('inputs', 'inputs_mask', 'inputs_tasks', 'embeddings')
    batch = {key: padded_inputs[key] for key in keys if key in padded_inputs}
    batch |= {
      key: padded_choices[key].reshape(num_rows, c, t)
      for key in ('targets', 'targets_mask')
    }
    batch = sharding.shard_whole_batch(self._mesh, batch)
    targets, mask = batch.pop('targets'), batch.pop('targets_mask')
    return sharding.gather(self._score(variables, batch, targets, mask))

  def _encode_texts(
    self, texts: set[str], length: int
  ) -> dict[str, tuple[list[int], bool]]:
    """{text: (at most `length` ids with EOS, whether the end was cut)}."""
    eos = require_eos(self._tokenizer)
    ordered = sorted(texts)
    encoded = map(list, self._tokenizer.encode_all(ordered)) if ordered else ()
    return {
      text: ([*ids[: length - 1], eos], len(ids) >= length)
      for text, ids in zip(ordered, encoded, strict=True)
    }

  def _encode_prompts(
    self, texts: set[str], length: int
  ) -> dict[str, tuple[list[int], bool]]:
    """{text: (at most `length` prompt ids, whether the start was cut)}."""
    ordered = sorted(texts)
    encoded = batching_decoder_only.encode_prompts(self._tokenizer, ordered)
    bos = self._tokenizer.bos
    return {
      text: (
        list(batching_decoder_only.keep_last(ids, length, bos)),
        len(ids) > length,
      )
      for text, ids in zip(ordered, encoded, strict=True)
    }


def _next_power_of_2(n: int) -> int:
  """The least power of two that is at least `n`."""
  return 1 << (n - 1).bit_length()
