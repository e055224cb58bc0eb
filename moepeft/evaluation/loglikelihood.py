# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of targets: -log p of each, in nats."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.types import Array, Batch, Tree
from moepeft.data.batching.bucketing import buckets, repeat_last
from moepeft.data.batching.collators import Collator, Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.models import decoder_only
from moepeft.moe.task_names import model_task_names
from moepeft.objectives.cross_entropy import token_losses
from moepeft.peft.prefix import model_prefix_ids
from moepeft.tasks import Example

# Below these, lengths of inputs and targets are not worth a program.
_LEAST = 64, 16


def losses(model: Any, variables: Tree, batch: Batch) -> Array:
  """-log p of each token of the targets in nats, 0 on padding: [b, t].

  Args:
    batch: of `batching.seq2seq.pad_pairs`, or of
      `batching.decoder_only.pad_samples`.
  """
  logits = model.apply(variables, batch)
  nll = token_losses(logits, batch['targets'])
  return jnp.where(batch['targets_mask'], nll, 0)


class Likelihood:
  """Scores the targets of examples, with one compiled program per shape."""

  def __init__(
    self,
    model: Any,
    tokenizer: Tokenizer,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
    mesh: Mesh | None = None,
  ):
    """`batch_size` is rounded up to a multiple of the mesh's devices."""
    self._losses = jax.jit(functools.partial(losses, model))
    options = {
      'prefix_ids': model_prefix_ids(model),
      'tasks': model_task_names(model),
    }
    self._collator: Collator = Seq2SeqCollator(
      tokenizer, inputs_length, targets_length, **options
    )
    if decoder_only(model):
      length = inputs_length + targets_length
      self._collator = CausalCollator(tokenizer, length, **options)
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._rows = sharding.round_up(self._mesh, batch_size)

  def cut(self, examples: Sequence[Example]) -> np.ndarray:
    """Whether the inputs or targets of each are cut: bool [n]."""
    return np.array([self._collator.count_cut([e]) for e in examples], bool)

  def sums(
    self,
    variables: Tree,
    examples: Sequence[Example],
    progress: Callable[[int], None] | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """(-log p of each example's targets, how many tokens they are).

    Targets are those of training: cut to the length, with EOS, which counts.

    Args:
      progress: told after each batch how many more examples are done.

    Returns:
      float64 [n] in nats, summed over tokens on the host; int64 [n].
    """
    encoded = self._collator.encode(examples)
    lengths, tokens = self._collator.sizes(encoded)
    nll = np.zeros(len(encoded), np.float64)
    most = self._collator.lengths
    for shape, places in buckets(
      lengths, _LEAST[: len(most)], most, self._rows
    ):
      filled = [encoded[i] for i in repeat_last(places, self._rows)]
      batch = self._collator.resized(shape).pad(filled)
      batch = sharding.shard_whole_batch(self._mesh, batch)
      losses = sharding.gather(self._losses(variables, batch))
      nll[places] = losses[: len(places)].sum(axis=1, dtype=np.float64)
      if progress is not None:
        progress(len(places))
    return nll, np.array(tokens, np.int64)
