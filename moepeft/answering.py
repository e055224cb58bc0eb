# SPDX-License-Identifier: Apache-2.0
"""What a model answers: the greedy continuations of many inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moepeft import sharding
from moepeft.data import batching
from moepeft.data.buckets import buckets, whole
from moepeft.data.vocabulary import Vocabulary
from moepeft.decoding import greedy
from moepeft.tasks import Example
from moepeft.typing import Tree

# Below it, a length of inputs is not worth a program.
_LEAST = 64


class Answering:
  """Answers examples greedily, with one compiled program a shape."""

  def __init__(
    self,
    model: Any,
    vocabulary: Vocabulary,
    inputs_length: int,
    length: int,
    batch_size: int,
    mesh: Mesh | None = None,
  ):
    """`batch_size` is rounded up to a multiple of the mesh's devices.

    Args:
      length: tokens to generate at most, EOS included.

    Raises:
      ValueError: `length` is below 1.
    """
    if length < 1:
      raise ValueError(f'an answer has at least 1 token; got length={length}')
    self._model, self._vocabulary = model, vocabulary
    self._most, self._length = inputs_length, length
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._rows = sharding.round_up(self._mesh, batch_size)

  def cut(self, examples: Sequence[Example]) -> np.ndarray:
    """Whether the inputs of each are cut: bool [n]."""
    texts = [e.inputs for e in examples]
    found = [batching.cut(self._vocabulary, x, self._most)[1] for x in texts]
    return np.array(found, bool)

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
    words = self._vocabulary
    ids = [batching.cut(words, text, self._most)[0] for text in inputs]
    lengths = [(len(x),) for x in ids]
    found = [''] * len(ids)
    for (s,), places in buckets(lengths, (_LEAST,), (self._most,), self._rows):
      rows = [ids[i] for i in whole(places, self._rows)]
      tokens = self._tokens(variables, rows, s)
      for i, row in zip(places, tokens.tolist(), strict=False):
        found[i] = words.decode([token for token in row if token > words.eos])
      if progress is not None:
        progress(len(places))
    return found

  def _tokens(self, variables: Tree, rows: list[list[int]], s: int):
    """int32 [b, length] of b inputs, padded to s."""
    batch = batching.seq2seq(rows, rows, s, s)
    batch = {key: batch[key] for key in ('inputs', 'inputs_mask')}
    batch = sharding.shard_whole_batch(self._mesh, batch)
    eos = self._vocabulary.eos
    return sharding.gather(
      greedy(self._model, variables, batch, self._length, eos=eos)
    )
