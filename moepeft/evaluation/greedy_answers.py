# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a model to many inputs.

Of a decoder-only model an input is a prompt, in the form of its training, and
the answer what follows it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.types import Tree
from moepeft.data.batching import decoder_only, seq2seq
from moepeft.data.batching.bucketing import buckets, repeat_last
from moepeft.data.batching.packing import length_after_prefix
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference.generator import GenerationConfig, Generator, check_room
from moepeft.inference.prompts import asked
from moepeft.peft.methods.prompt_tuning import before
from moepeft.tasks import Example

# Below it, a length of inputs is not worth a program.
_LEAST = 64


class Answering:
  """Answers examples greedily, with one compiled program a shape."""

  def __init__(
    self,
    model: Any,
    vocabulary: Tokenizer,
    inputs_length: int,
    length: int,
    batch_size: int,
    mesh: Mesh | None = None,
    ends: Sequence[int] = (),
  ):
    """`batch_size` is rounded up to a multiple of the mesh's devices.

    Args:
      length: tokens to generate at most, EOS included.
      ends: ids that end an answer; by default the vocabulary's.

    Raises:
      ValueError: `length` is below 1, or a decoder has no room for both.
    """
    # Of what may come, so that it is said before anything runs.
    check_room(model, inputs_length, length)
    mesh = sharding.make_mesh() if mesh is None else mesh
    self._decoder_only = hasattr(model, 'extend')
    front = before(model)
    self._before, self._vocabulary = len(front), vocabulary
    self._most = length_after_prefix(inputs_length, front, 'the inputs')
    self._rows = sharding.round_up(mesh, batch_size)
    settings = GenerationConfig(length, tuple(ends) or (vocabulary.eos,))
    self._generation = Generator(model, vocabulary, settings, mesh)

  def cut(self, examples: Sequence[Example]) -> np.ndarray:
    """Whether the inputs of each are cut: bool [n]."""
    return np.array([self._ids(e.inputs)[1] for e in examples], bool)

  def answers(
    self,
    variables: Tree,
    examples: Sequence[Example],
    progress: Callable[[int], None] | None = None,
  ) -> list[str]:
    """The most probable continuation of each example's inputs, as text.

    Args:
      progress: told after each batch how many more examples are done.
    """
    return self.texts(variables, [e.inputs for e in examples], progress)

  def texts(
    self,
    variables: Tree,
    inputs: Sequence[str],
    progress: Callable[[int], None] | None = None,
  ) -> list[str]:
    """`answers` of inputs alone."""
    ids = [self._ids(text)[0] for text in inputs]
    lengths = [(len(x),) for x in ids]
    answers = [''] * len(ids)
    for (s,), places in buckets(lengths, (_LEAST,), (self._most,), self._rows):
      rows = [ids[i] for i in repeat_last(places, self._rows)]
      s += self._before
      generated = self._generation.texts(variables, rows, s=s)
      for i, text in zip(places, generated, strict=False):
        answers[i] = text
      if progress is not None:
        progress(len(places))
    return answers

  def _ids(self, text: str) -> tuple[list[int], bool]:
    """(ids of an input, whether it was cut to the most there may be)."""
    if not self._decoder_only:
      return seq2seq.encode_truncated(self._vocabulary, text, self._most)
    ids = asked(self._vocabulary, text, decoder_only=True)
    # The end of a prompt is what is answered.
    short = decoder_only.keep_last(ids, self._most, self._vocabulary.bos)
    return list(short), len(ids) > self._most
