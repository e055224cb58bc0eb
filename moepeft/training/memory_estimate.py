# SPDX-License-Identifier: Apache-2.0
"""Whether training or generation fits into memory, estimated from shapes.

The estimate is a lower bound, before anything is allocated: weights, gradients
and optimizer state, a batch, and of its activations one layer's and the logits;
or the cache of answers. What exceeds the memory cannot work; what does not may
still need more.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize as quantised
from moepeft.core.types import Tree
from moepeft.models import decoder_only
from moepeft.nn import initializers as start
from moepeft.objectives import COMPARED
from moepeft.training import optim

# Where Linux tells of a machine's and of a control group's memory.
_MEMINFO = '/proc/meminfo'
_GROUP = '/sys/fs/cgroup'
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
  'or config.model.quantise',
  'training': 'lower the rank, experts or length in config.method, or train an '
  'adapter instead of the whole model',
  'batch': 'lower config.batch_size or the lengths of config.data',
  'activations': 'lower config.batch_size or the lengths of config.data, or '
  'raise config.accumulate',
  'workers': 'lower config.data.workers',
}


def need(config: ConfigDict) -> Need:
  """The least that training by a config needs; nothing is allocated.

  Raises:
    ValueError: the config names no model or no method that there is.
  """
  family, shape = base_lib.shape(config.model)
  base = base_lib.Base(family, shape, None, '', '')
  model, built = base_lib.module(base, config)
  shapes = start.shapes(model, base_lib.example_batch())
  base_shapes = shapes['params']
  if config.model.quantise and built.trainable != 'params':
    base_shapes = quantised.shapes(base_shapes, shape, config.model.quantise)
  trained = shapes[built.trainable]
  weights = size(base_shapes) + size(shapes['peft'])
  # The gradient is as large as the weights that it is of.
  state = size(trained)
  if state < _MANY:
    optimizer = optim.optimizer(config.optimizer, config.steps)
    state += size(jax.eval_shape(optimizer.init, trained))
  rows = config.batch_size
  sides = 2 if config.objective in COMPARED else 1
  data = config.data
  if decoder_only(shape):
    fed, predicted = data.length, data.length
  else:
    fed, predicted = (
      data.inputs_length + data.targets_length,
      (data.targets_length),
    )
  part = math.ceil(rows / config.accumulate)
  item = jnp.dtype(config.model.dtype).itemsize
  return Need(
    weights=weights,
    training=state,
    batch=rows * sides * fed * _TOKEN_BYTES,
    activations=part * (fed * shape.d_model + predicted * shape.vocab) * item,
    workers=data.workers * _WORKER,
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
  free, owner = available()
  total = _per_device(needed, config)
  if free and total > free:
    parts = dataclasses.asdict(needed)
    largest = max(parts, key=parts.get)
    listed = ', '.join(f'{k} {_text(v)}' for k, v in parts.items() if v)
    raise ValueError(
      f'training needs at least {_text(total)} of memory ({listed}), and '
      f'{owner} has {_text(free)}; {_ADVICE[largest]}'
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
  check_arrays(
    cache + logits,
    f'{rows:,} answers of {tokens:,} tokens',
    '--length, --batch_size, --num or --beams',
  )


def check_arrays(size: int, name: str, advice: str) -> None:
  """Checks that arrays fit before they are made.

  Args:
    size: bytes of them.
    name: of the arrays, a plural.
    advice: the flags to lower.

  Raises:
    ValueError: there are fewer bytes, with both figures.
  """
  free, owner = available()
  if free and size > free:
    raise ValueError(
      f'{name} need at least {_text(size)} of memory, and {owner} has '
      f'{_text(free)}; lower {advice}'
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


def available() -> tuple[int, str]:
  """(bytes that can be allocated, whose they are); 0 where nothing tells."""
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return _host(), 'this machine'
  stats: Mapping[str, int] = device.memory_stats() or {}
  free = stats.get('bytes_limit', 0) - stats.get('bytes_in_use', 0)
  return max(free, 0), f'the device {device.device_kind}'


def _host(meminfo: str = _MEMINFO, group: str = _GROUP) -> int:
  """Available memory and swap, or less where a control group says so."""
  limits = []
  try:
    with open(meminfo) as f:
      lines = dict(line.split(':', 1) for line in f)
    kilobytes = [lines[k].split()[0] for k in ('MemAvailable', 'SwapFree')]
    limits.append(sum(map(int, kilobytes)) * 1024)
  except (OSError, KeyError, ValueError):
    pass
  for most, used in (
    ('memory.max', 'memory.current'),
    ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
  ):
    try:
      limit, used_bytes = (
        int(_line(os.path.join(group, name))) for name in (most, used)
      )
      # Pages of files that the group holds count as used and can be dropped.
      limits.append(max(limit - used_bytes, 0) + _cache(group, most))
    except (OSError, ValueError):  # no such group, or 'max'
      continue
  return min(limits, default=0)


def _cache(group: str, most: str) -> int:
  with open(os.path.join(group, os.path.dirname(most), 'memory.stat')) as f:
    fields = dict(line.split() for line in f)
  return int(fields.get('file', fields.get('total_cache', 0)))


def _line(path: str) -> str:
  with open(path) as f:
    return f.read().strip()


def _text(count: float) -> str:
  """2100000000 -> '2.1 GB'."""
  for unit in ('kB', 'MB', 'GB', 'TB'):
    count /= 1000
    if count < 1000:
      return f'{count:.3g} {unit}'
  return f'{count:,.0f} TB'
