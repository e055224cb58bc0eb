# SPDX-License-Identifier: Apache-2.0
"""Prompts in, texts out: batches of token ids through a model's loop.

Lengths are rounded up to powers of two, so that there are few programs; of a
prompt never beyond the places that a model has.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.types import Array, Tree
from moepeft.data.batching import packing, seq2seq
from moepeft.data.batching.bucketing import repeat_last, round_up
from moepeft.data.tokenizers.tokenizer import Tokenizer, skipped_special_tokens
from moepeft.inference.beam_search import BeamConfig, search
from moepeft.inference.decode import PAD, How, advance, start
from moepeft.inference.detokenizer import TextStream
from moepeft.inference.sampling import Sampling
from moepeft.peft.methods.prompt_tuning import before

# Below them, a length of prompts or of answers is not worth a program.
_LEAST_PROMPT, _LEAST_ANSWER = 64, 32
_MOST = 1 << 30
# Tokens between looks for stop strings.
_LOOK = 8


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """How answers are made.

  Attributes:
    length: tokens of an answer at most, its end included.
    least: tokens before which no end is chosen.
    beams: to search instead of to sample, or None.
    ends: ids that end an answer and are no text.
    stops: texts that an answer is cut before.
  """

  length: int
  ends: tuple[int, ...]
  least: int = 0
  sampling: Sampling = Sampling()
  beams: BeamConfig | None = None
  stops: tuple[str, ...] = ()

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(
        f'an answer has at least 1 token; got length={self.length}'
      )
    if not 0 <= self.least <= self.length:
      raise ValueError(
        f'the least tokens are from 0 to length={self.length}; got {self.least}'
      )
    if '' in self.stops:
      raise ValueError('a stop string is empty; leave it out')
    alone = self.sampling != Sampling() or self.least
    if self.beams is not None and alone:
      raise ValueError(
        'beams are searched for the most probable answer; leave out '
        'temperature, its filters, penalties and the least tokens'
      )


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What came of a batch since the last time.

  Attributes:
    texts: new text of each row.
    tokens: new tokens of all rows that had not ended.
  """

  texts: list[str]
  tokens: int


def keys(seed: int, rows: int) -> Array:
  """[rows] keys of draws, different in each row, of one seed."""
  key = jax.random.key(seed)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def check_room(model: Any, prompt: int, answer: int) -> None:
  """Looks whether a decoder has places for a prompt and its answer.

  Args:
    prompt, answer: their tokens.

  Raises:
    ValueError: it has not.
  """
  if not hasattr(model, 'extend'):
    return
  room = model.config.length
  if prompt + answer > room:
    raise ValueError(
      f'the longest prompt has {prompt:,} tokens and an answer up to '
      f'{answer:,}; together the model has room for {room:,}: shorten the '
      'prompt, or the length of the answer'
    )


class Generator:
  """Answers batches of prompts, the model's soft prompt before each."""

  def __init__(
    self,
    model: Any,
    words: Tokenizer,
    settings: GenerationConfig,
    mesh: Mesh | None = None,
  ):
    self._model, self._words, self._settings = model, words, settings
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._decoder_only, self._before = hasattr(model, 'extend'), before(model)
    # An encoder-decoder may say padding; it is no text either.
    self._silent = {*settings.ends, *(() if self._decoder_only else (PAD,))}
    self._how = How(
      settings.sampling,
      jnp.array(settings.ends, jnp.int32),
      jnp.int32(settings.least) if settings.least else None,
    )

  def check(self, prompts: Sequence[Sequence[int]]) -> None:
    """Looks at prompts (ids) before any of them is answered.

    Raises:
      ValueError: one has no token, or the model has no room for its answer.
    """
    lengths = [len(ids) for ids in prompts]
    if lengths and not min(lengths):
      raise ValueError(
        f'prompt {lengths.index(0)} has no token to go on from; leave it out'
      )
    longest = max(lengths, default=0) + len(self._before)
    check_room(self._model, longest, self._settings.length)

  def texts(
    self,
    variables: Tree,
    prompts: Sequence[Sequence[int]],
    keys: Array | None = None,
    s: int = 0,
  ) -> list[str]:
    """The answer to each prompt (ids), as text.

    Args:
      keys: of each row's draws, where there is a temperature.
      s: what prompts are padded to, a soft prompt included; 0 to round up
        the longest.
    """
    if not self._settings.stops:
      tokens = self.tokens(variables, prompts, keys, s)
      return [self._words.decode(self._said(row)) for row in tokens]
    found = [''] * len(prompts)
    for news in self.stream(variables, prompts, keys, _LOOK, s):
      found = [a + b for a, b in zip(found, news.texts, strict=True)]
    return found

  def tokens(
    self,
    variables: Tree,
    prompts: Sequence[Sequence[int]],
    keys: Array | None = None,
    s: int = 0,
  ) -> list[list[int]]:
    """The ids of each answer, its end included; stop strings do not count."""
    every = self._settings.length
    given_up = np.zeros(len(prompts), bool)
    *_, tokens = self._parts(variables, prompts, keys, every, s, given_up)
    return [self._ended(row.tolist()) for row in tokens]

  def stream(
    self,
    variables: Tree,
    prompts: Sequence[Sequence[int]],
    keys: Array | None = None,
    every: int = 1,
    s: int = 0,
  ) -> Iterator[Chunk]:
    """Texts as they come, every so many tokens."""
    stops = self._settings.stops
    streams = [
      TextStream(
        self._words.decode,
        stops,
        lambda text: skipped_special_tokens(self._words, text),
      )
      for _ in prompts
    ]
    given_up = np.zeros(len(prompts), bool)
    before = [0] * len(prompts)
    for tokens in self._parts(variables, prompts, keys, every, s, given_up):
      texts, new = [], 0
      for i, row in enumerate(tokens.tolist()):
        # What a row has after its text stopped is padding.
        ids = [] if given_up[i] else self._ended(row)[before[i] :]
        texts.append(streams[i].feed(self._said(ids)))
        before[i] += len(ids)
        new += len(ids)
      yield Chunk(texts, new)
      given_up[:] = [stream.stopped for stream in streams]
    yield Chunk([stream.finish() for stream in streams], 0)

  def _parts(self, variables, prompts, keys, every, s, given_up):
    """Yields int32 [n, count], all tokens so far.

    Args:
      given_up: bool [n], rows that need no more; read after each yield.
    """
    n, most = len(prompts), self._settings.length
    batch = self._batch(prompts, s)
    length = round_up(most, _LEAST_ANSWER, _MOST)
    if self._settings.beams is not None:
      yield self._searched(variables, batch, length)[:n]
      return
    # Rows that fill the batch are copies of the last.
    copies = np.array(repeat_last(range(n), len(batch['inputs'])))
    keys = None if keys is None else keys[copies]
    rows = start(self._model, variables, batch, self._how, length, keys)
    for count in [*range(1, most, every), most]:
      if count > 1:
        rows = advance(self._model, variables, rows, self._how, count)
      # Copies: the next call writes over the rows.
      tokens, done = map(np.array, sharding.gather((rows.tokens, rows.done)))
      yield tokens[:n, :count]
      over = given_up[copies]
      if (done | over).all():
        return
      if over.any():
        rows = rows.replace(done=rows.done | over)

  def _batch(self, prompts, s):
    self.check(prompts)
    prompts = [packing.prepend(self._before, ids) for ids in prompts]
    longest = max(map(len, prompts))
    # Padding beyond learned positions would be no number, and spoil the rest.
    most = self._model.config.length if self._decoder_only else _MOST
    s = s or round_up(longest, _LEAST_PROMPT, most)
    many = sharding.round_up(self._mesh, len(prompts))
    rows = [prompts[i] for i in repeat_last(range(len(prompts)), many)]
    batch = {
      'inputs': seq2seq.pad_rows(rows, s),
      'inputs_mask': np.arange(s) < np.array([len(r) for r in rows])[:, None],
    }
    return sharding.shard_whole_batch(self._mesh, batch)

  def _searched(self, variables, batch, length):
    tokens, _ = search(
      self._model,
      variables,
      batch,
      self._how.ends,
      length,
      self._settings.beams,
      jnp.int32(self._settings.length),
    )
    return sharding.gather(tokens)[:, 0, : self._settings.length]

  def _ended(self, row: list[int]) -> list[int]:
    """A row up to its first end, that included."""
    for i, token in enumerate(row):
      if token in self._settings.ends:
        return row[: i + 1]
    return row

  def _said(self, row: list[int]) -> list[int]:
    """What of a row is text."""
    return [token for token in row if token not in self._silent]
