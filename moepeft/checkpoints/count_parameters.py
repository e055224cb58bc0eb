# SPDX-License-Identifier: Apache-2.0
"""Counts the parameters of a config's base and method, from shapes."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.core.types import Tree
from moepeft.models import weight_mapping
from moepeft.moe import router_state
from moepeft.nn import initializers
from moepeft.nn.expert_padding import PaddedAxis, padding_size
from moepeft.peft import Built
from moepeft.peft.tied_layers import spare_sizes

_LAYERS_PART = re.compile(r'(^|/)layers(_\d+)?(?=/)')


def count(config: ConfigDict, shape: Any = None) -> dict[str, Any]:
  """Counts a config's parameters; allocates nothing.

  Args:
    shape: the base's, from `base.shape`; None looks it up.

  Returns:
    {'params': parameters of the base, 'peft': trained parameters (the base for
    full fine-tuning), 'percent': 100 * peft / params, 'megabytes': memory of
    both by config.model.param_dtype and quantize, with padding, 'by_site': peft
    by site, summed over layers, largest first}. If the layers differ in their
    number of experts, 'padding' is the number of further zeros in memory.
  """
  family, model = shape or base_lib.shape(config.model)
  base = base_lib.Base(family, model, None, '', '')
  module, built = base_lib.module(base, config)
  # `padded_axes` below reuses this cached trace.
  shapes = initializers.shapes(module, base_lib.example_batch())
  base_count, stored_params = _count(shapes['params']), shapes['params']
  if config.model.quantize:
    stored_params = quantize.shapes(stored_params, model, config.model.quantize)
  trainable = shapes.get(built.trainable, {})
  trained, _ = router_state.split(trainable, built.frozen_arrays)
  spare = spare_sizes(trained, built.tied_arrays, built.unread_arrays)
  trained = weight_mapping.flatten(trained)
  sites = defaultdict(int)
  padded = initializers.padded_axes(module, base_lib.example_batch())
  for path, leaf in trained.items():
    size = (
      padded[path].size(leaf.shape) if path in padded else math.prod(leaf.shape)
    )
    sites[_site(path, built.trainable)] += size - spare.get(path, 0)
  padding = padding_size({p: a.shape for p, a in trained.items()}, padded)
  peft = sum(sites.values())
  return {
    'params': base_count,
    'peft': peft,
    'percent': round(100 * peft / base_count, 4),
    'megabytes': {
      'params': round(quantize.size(stored_params) / 1e6, 3),
      'peft': round(quantize.size(shapes.get('peft', {})) / 1e6, 3),
    },
    'by_site': dict(sorted(sites.items(), key=lambda item: -item[1])),
  } | ({'padding': padding} if padding else {})


def count_trained(
  trainable: Tree, built: Built, padded: Mapping[str, PaddedAxis]
) -> tuple[int, int]:
  """(trained parameters, further zeros of padding) of arrays.

  Args:
    trainable: the collection that the method trains.
    padded: from `base.padded_axes`.
  """
  trained, _ = router_state.split(trainable, built.frozen_arrays)
  shapes = {
    path: leaf.shape for path, leaf in weight_mapping.flatten(trained).items()
  }
  padding = padding_size(shapes, padded)
  spare = spare_sizes(trained, built.tied_arrays, built.unread_arrays)
  return _count(trained) - padding - sum(spare.values()), padding


def _count(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _site(path: str, collection: str) -> str:
  """'encoder/layers/self/q/lora/a' -> 'encoder/self/q'."""
  path = _LAYERS_PART.sub('', path)
  parts = path.split('/')
  # A site is followed by adapter and array names, or by one weight name.
  if collection == 'params':
    return '/'.join(parts[:-1])
  suffix_parts = 3 if 'router' in parts else 2
  return '/'.join(parts[:-suffix_parts]).replace('around_', '')
