# SPDX-License-Identifier: Apache-2.0
"""Whether training or generation fits into memory, estimated from shapes.

The estimate is a lower bound, before anything is allocated: weights, gradients
and optimizer state, a batch, and of its activations one layer's and the logits;
or the cache of answers. What exceeds the memory cannot work; what does not may
still need more.
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
_WORKER = 100_000_000
# Arrays of int32 and masks that a batch has for each token, in bytes.
_TOKEN_BYTES = 9
# More parameters would overflow the sizes of XLA's arrays.
_MANY = 2**62


@dataclasses.dataclass(frozen=True)
class Need:
  """Bytes that a run needs at least, by purpose, on all devices together."""

  weights: int
  training: int
  batch: int
  activations: int
  workers: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


# What to lower, by the largest part of the need.
_ADVICE = {
  'weights': 'name a smaller model, or set config.model.param_dtype=bfloat16 '
  'or config.model.quantize',
  'training': 'lower the rank, experts or length in config.method, or train an '
  'adapter instead of the whole model',
  'batch': 'lower config.batch_size or the lengths of config.data',
  'activations': 'lower config.batch_size or the lengths of config.data, or '
  'raise config.gradient_accumulation_steps',
  'workers': 'lower config.data.num_workers',
}


def need(config: ConfigDict) -> Need:
  """The least that training by a config needs; nothing is allocated.

  Raises:
    ValueError: the config names no model or no method that there is.
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
  # The gradient is as large as the weights that it is of.
  state = size(trained)
  if state < _MANY:
    padded = initializers.padded_axes(model, base_lib.example_batch())
    optimizer = optimizers.make_optimizer(
      config.optimizer, config.steps, padded
    )
    state += size(jax.eval_shape(optimizer.init, trained))
  rows = config.batch_size
  sides = OBJECTIVES.lookup(config.objective).answers_per_row
  data = config.data
  if decoder_only(shape):
    fed, predicted = data.length, data.length
  else:
    fed, predicted = (
      data.inputs_length + data.targets_length,
      (data.targets_length),
    )
  part = math.ceil(rows / config.gradient_accumulation_steps)
  item = jnp.dtype(config.model.dtype).itemsize
  return Need(
    weights=weights,
    training=state,
    batch=rows * sides * fed * _TOKEN_BYTES,
    activations=part * (fed * shape.d_model + predicted * shape.vocab) * item,
    workers=data.num_workers * _WORKER,
  )


def size(tree: Tree) -> int:
  """Bytes of the arrays or shapes of a tree."""
  return sum(
    math.prod(leaf.shape) * _itemsize(leaf.dtype)
    for leaf in jax.tree.leaves(tree)
  )


def _itemsize(dtype: Any) -> int:
  return (
    1
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    else (jnp.dtype(dtype).itemsize)
  )


def check(config: ConfigDict) -> None:
  """
  Raises:
    ValueError: training needs more bytes than there are; the message has both
      figures and says what to lower.
  """
  needed = need(config)
  free, owner = memory.available()
  total = _per_device(needed, config)
  if free and total > free:
    parts = dataclasses.asdict(needed)
    largest = max(parts, key=parts.get)
    listed = ', '.join(f'{k} {memory.text(v)}' for k, v in parts.items() if v)
    raise ValueError(
      f'training needs at least {memory.text(total)} of memory ({listed}), and '
      f'{owner} has {memory.text(free)}; {_ADVICE[largest]}'
    )


def check_answers(model: Any, rows: int, tokens: int) -> None:
  """Looks at the cache of keys and values of answers that are made at once.

  Args:
    model: a model that generates.
    rows: answers, times the beams of each; tokens: the most of an answer.

  Raises:
    ValueError: they need more bytes than there are, with both figures.
  """
  shape = model.config
  layers = shape.layers if decoder_only(model) else shape.decoder_layers
  heads = shape.kv_heads if decoder_only(model) else shape.heads
  item = jnp.dtype(model.dtype).itemsize
  cache = 2 * rows * tokens * layers * heads * shape.head_dim * item
  logits = rows * shape.vocab * 4
  memory.check_arrays(
    cache + logits,
    f'{rows:,} answers of {tokens:,} tokens',
    '--max_new_tokens, --batch_size, --num_return_sequences or --num_beams',
  )


def _per_device(needed: Need, config: ConfigDict) -> int:
  """Bytes of the need that the memory of `available` must hold."""
  if jax.default_backend() == 'cpu':
    # All devices of a host share its memory.
    return needed.total // jax.process_count()
  count = jax.device_count()
  spread = 1 if config.sharding.preset == 'dp' else count
  return (needed.weights + needed.training) // spread + (
    needed.batch + needed.activations
  ) // count
