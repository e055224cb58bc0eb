# SPDX-License-Identifier: Apache-2.0
"""Parameters of a config's base and of its method, from shapes alone."""

import math
import re
from collections import defaultdict
from typing import Any

import jax
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.models import weight_mapping
from moepeft.moe import router_state
from moepeft.nn import initializers
from moepeft.nn.expert_padding import padding_size

_LAYERS = re.compile(r'(^|/)layers(_\d+)?(?=/)')


def count(config: ConfigDict) -> dict[str, Any]:
  """Counts a config's parameters; nothing is allocated.

  Returns:
    params: of the base; peft: what training changes (all of the base for
    full fine-tuning); percent: 100 * peft / params; megabytes: what the two
    take in memory, as config.model has them (param_dtype, quantise), padding
    included; by_site: peft at each site, over all layers, largest first. Where
    layers have unlike counts of experts also padding: zeros beyond those of
    peft, which take memory and operations as the others do.
  """
  family, model = base_lib.shape(config.model)
  base = base_lib.Base(family, model, None, '', '')
  module, built = base_lib.module(base, config)
  # Its trace is that of padded_axes below, which is kept.
  shapes = initializers.shapes(module, base_lib.example_batch())
  n_params, stored_params = _total(shapes['params']), shapes['params']
  if config.model.quantize:
    stored_params = quantize.shapes(stored_params, model, config.model.quantize)
  trainable = shapes.get(built.trainable, {})
  trained, _ = router_state.split(trainable, built.frozen_arrays)
  trained = weight_mapping.flatten(trained)
  sites = defaultdict(int)
  padded = initializers.padded_axes(module, base_lib.example_batch())
  for path, leaf in trained.items():
    size = (
      padded[path].size(leaf.shape) if path in padded else math.prod(leaf.shape)
    )
    sites[_site(path, built.trainable)] += size
  padding = padding_size({p: a.shape for p, a in trained.items()}, padded)
  peft = sum(sites.values())
  return {
    'params': n_params,
    'peft': peft,
    'percent': round(100 * peft / n_params, 4),
    'megabytes': {
      'params': round(quantize.size(stored_params) / 1e6, 3),
      'peft': round(quantize.size(shapes.get('peft', {})) / 1e6, 3),
    },
    'by_site': dict(sorted(sites.items(), key=lambda item: -item[1])),
  } | ({'padding': padding} if padding else {})


def _total(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _site(path: str, collection: str) -> str:
  """'encoder/layers/self/q/lora/a' -> 'encoder/self/q'."""
  path = _LAYERS.sub('', path)
  parts = path.split('/')
  # Below a site, an adapter and its arrays; a weight is one name.
  if collection == 'params':
    return '/'.join(parts[:-1])
  cut = 3 if 'router' in parts else 2
  return '/'.join(parts[:-cut]).replace('around_', '')
