# SPDX-License-Identifier: Apache-2.0
"""Estimates from shapes whether training or generation fits into memory.

The estimate is a lower bound, made before anything is allocated: weights,
gradients, optimizer state, a batch, the activations of one layer and the
logits; or the KV cache. A run within the estimate may still exceed the memory.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.core import memory
from moepeft.core.types import Tree
from moepeft.models import decoder_only
from moepeft.moe import router_state
from moepeft.nn import initializers
from moepeft.objectives import OBJECTIVES
from moepeft.training import optimizers

# Resident bytes of a loader process after its imports, at least.
_WORKER_BYTES = 100_000_000
# Bytes of a batch's int32 arrays and masks for each token.
_TOKEN_BYTES = 9
# A larger size would overflow XLA's array sizes.
_MAX_BYTES = 2**62


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
  """The minimum bytes of a run by purpose, summed over all devices."""

  weights: int
  training: int
  batch: int
  activations: int
  workers: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


# Remedies by the largest part of the estimate.
_REMEDIES = {
  'weights': 'name a smaller model, or set config.model.param_dtype=bfloat16 '
  'or config.model.quantize',
  'training': 'lower the rank, experts or length in config.method, or train an '
  'adapter instead of the whole model',
  'batch': 'lower config.batch_size or the lengths of config.data',
  'activations': 'lower config.batch_size or the lengths of config.data, or '
  'raise config.gradient_accumulation_steps',
  'workers': 'lower config.data.num_workers',
}


def estimate_training(config: ConfigDict) -> MemoryEstimate:
  """The minimum memory of training; allocates nothing.

  Raises:
    ValueError: the config has an unknown model or method.
  """
  family, shape = base_lib.shape(config.model)
  base = base_lib.Base(family, shape, None, '', '')
  model, built = base_lib.module(base, config)
  shapes = initializers.shapes(model, base_lib.example_batch())
  base_shapes = shapes['params']
  if config.model.quantize and built.trainable != 'params':
    base_shapes = quantize.shapes(base_shapes, shape, config.model.quantize)
  trained, _ = router_state.split(shapes[built.trainable], built.frozen_arrays)
  weights = size(base_shapes) + size(shapes['peft'])
  # A gradient has the size of its weights.
  state = size(trained)
  if state < _MAX_BYTES:
    padded = initializers.padded_axes(model, base_lib.example_batch())
    optimizer = optimizers.make_optimizer(
      config.optimizer, config.steps, padded
    )
    optimizer = built.wrap_optimizer(optimizer, config.steps)
    state += size(jax.eval_shape(optimizer.init, trained))
  rows = config.batch_size
  answers = OBJECTIVES.lookup(config.objective).answers_per_row
  data = config.data
  if decoder_only(shape):
    read_tokens, scored_tokens = data.length, data.length
  else:
    read_tokens, scored_tokens = (
      data.inputs_length + data.targets_length,
      data.targets_length,
    )
  part = math.ceil(rows / config.gradient_accumulation_steps)
  itemsize = jnp.dtype(config.model.dtype).itemsize
  return MemoryEstimate(
    weights=weights,
    training=state,
    batch=rows * answers * read_tokens * _TOKEN_BYTES,
    activations=part
    * (read_tokens * shape.d_model + scored_tokens * shape.vocab)
    * itemsize,
    workers=data.num_workers * _WORKER_BYTES,
  )


def size(tree: Tree) -> int:
  """Bytes of the arrays or shapes of a tree."""
  return sum(
    math.prod(leaf.shape) * _itemsize(leaf.dtype)
    for leaf in jax.tree.leaves(tree)
  )


def _itemsize(dtype: Any) -> int:
  if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
    return 1
  return jnp.dtype(dtype).itemsize


def check(config: ConfigDict) -> None:
  """
  Raises:
    ValueError: training needs more memory than is free; the message has both
      sizes and a remedy.
  """
  estimate = estimate_training(config)
  free, owner = memory.available()
  total = _per_device(estimate, config)
  if free and total > free:
    parts = dataclasses.asdict(estimate)
    largest = max(parts, key=parts.get)
    listed = ', '.join(f'{k} {memory.text(v)}' for k, v in parts.items() if v)
    raise ValueError(
      f'training needs at least {memory.text(total)} of memory ({listed}), and '
      f'{owner} has {memory.text(free)}; {_REMEDIES[largest]}'
    )


def check_answers(model: Any, rows: int, tokens: int) -> None:
  """Checks that the KV cache and logits of a generated batch fit into memory.

  Args:
    model: a model that generates.
    rows: the number of answers times beams.
    tokens: the maximum length of an answer.

  Raises:
    ValueError: they exceed the free memory; the message has both sizes.
  """
  shape = model.config
  layers = shape.layers if decoder_only(model) else shape.decoder_layers
  heads = shape.kv_heads if decoder_only(model) else shape.heads
  itemsize = jnp.dtype(model.dtype).itemsize
  cache = 2 * rows * tokens * layers * heads * shape.head_dim * itemsize
  logits = rows * shape.vocab * 4
  memory.check_arrays(
    cache + logits,
    f'{rows:,} answers of {tokens:,} tokens',
    '--max_new_tokens, --batch_size, --num_return_sequences or --num_beams',
  )


def _per_device(estimate: MemoryEstimate, config: ConfigDict) -> int:
  """Bytes of the estimate that one device, or the host's CPU, must hold."""
  if jax.default_backend() == 'cpu':
    # All devices of a host share its memory.
    return estimate.total // jax.process_count()
  count = jax.device_count()
  spread = 1 if config.sharding.preset == 'dp' else count
  return (estimate.weights + estimate.training) // spread + (
    estimate.batch + estimate.activations
  ) // count
