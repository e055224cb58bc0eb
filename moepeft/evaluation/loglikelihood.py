# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of targets, in nats."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moepeft.core import sharding
from moepeft.core.types import Array, Batch, Tree
from moepeft.data.batching.bucketing import (
  make_buckets,
  repeat_last,
)
from moepeft.data.batching.collators import Collator, Seq2SeqCollator
from moepeft.data.batching.decoder_only import (
  CausalCollator,
)
from moepeft.data.batching.router_inputs import RouterInputs
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.models import decoder_only
from moepeft.objectives.cross_entropy import token_losses
from moepeft.peft.prefix import model_prefix_ids
from moepeft.tasks import Example

# The shortest (inputs, targets) lengths of a batch, to limit compilations.
_MIN_LENGTHS = 64, 16


def losses(model: Any, variables: Tree, batch: Batch) -> Array:
  """-log p of each target token in nats, 0 without a loss: [b, t].

  Args:
    batch: a result of `batching.seq2seq.pad_pairs` or
      `batching.decoder_only.pad_samples`.
  """
  logits = model.apply(variables, batch)
  nll = token_losses(logits, batch['targets'])
  return jnp.where(batch['targets_mask'], nll, 0)


class Likelihood:
  """Scores the targets of examples, with one program per batch shape."""

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
      'router_inputs': RouterInputs.of_method(model.adapter_map),
    }
    self._collator: Collator = Seq2SeqCollator(
      tokenizer, inputs_length, targets_length, **options
    )
    if decoder_only(model):
      length = inputs_length + targets_length
      self._collator = CausalCollator(tokenizer, length, **options)
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._batch_rows = sharding.round_up(self._mesh, batch_size)

  def cut(self, examples: Sequence[Example]) -> np.ndarray:
    """Whether each example's inputs or targets are truncated: bool [n]."""
    return np.array(
      [self._collator.count_truncated([e]) for e in examples], bool
    )

  def sums(
    self,
    variables: Tree,
    examples: Sequence[Example],
    progress: Callable[[int], None] | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """(-log p, number of tokens) of each example's targets.

    Targets are truncated as in training, and their EOS counts.

    Args:
      progress: called after each batch with its number of examples.

    Returns:
      float64 [n] in nats, summed over tokens; int64 [n].
    """
    encoded = self._collator.encode(examples)
    lengths, tokens = self._collator.sizes(encoded)
    nll = np.zeros(len(encoded), np.float64)
    max_lengths = self._collator.lengths
    min_lengths = _MIN_LENGTHS[: len(max_lengths)]
    for shape, indices in make_buckets(
      lengths, min_lengths, max_lengths, self._batch_rows
    ):
      rows = [encoded[i] for i in repeat_last(indices, self._batch_rows)]
      batch = self._collator.resized(shape).pad(rows)
      batch = sharding.shard_whole_batch(self._mesh, batch)
      losses = sharding.gather(self._losses(variables, batch))
      nll[indices] = losses[: len(indices)].sum(axis=1, dtype=np.float64)
      if progress is not None:
        progress(len(indices))
    return nll, np.array(tokens, np.int64)
