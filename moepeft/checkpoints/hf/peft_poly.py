# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Poly of `peft`, which with splits is MHR.

peft has tasks by their numbers, from 0; they are read as the names '0', '1',
... At each module A is [splits, skills, in / splits, r], B [splits, skills, r,
out / splits], and the router [tasks, splits * skills], without the row of
padding. A layer that the adapter omits gets zeros.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moepeft.checkpoints import directory
from moepeft.checkpoints.adapter import (
  AdapterWeights,
  site_patterns,
  sites_in,
)
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf.peft_names import PREFIX, site_module
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError
from moepeft.moe.routers.poly import Poly
from moepeft.peft import build

PEFT_TYPE = 'POLY'
_INSTANCE = 'poly'
_A, _B = 'poly_lora_A', 'poly_lora_B'
_ROUTER = 'poly_router.module_logits'


def read(
  path: str, config: Any, fields: Mapping[str, Any], tensors: directory.Tensors
) -> AdapterWeights:
  """Reads an adapter's method and float32 tree.

  Args: as of `peft_prompt.read`.

  Raises:
    CheckpointError: an array is missing or has a wrong shape, or there is none.
  """
  tasks, e, splits, rank = (
    fields[name] for name in ('n_tasks', 'n_skills', 'n_splits', 'r')
  )
  features = _features(config)
  modules, shapes = {}, {}
  for site, axes in features.items():
    # peft divides in the same way, and fails where the splits do not divide.
    inside, outside = (math.prod(sizes) // splits for sizes in axes)
    for name in _modules(config, site):
      if f'{name}.{_A}' in tensors.shapes:
        modules[site] = _modules(config, site)
        shapes |= {
          f'{name}.{_A}': (splits, e, inside, rank),
          f'{name}.{_B}': (splits, e, rank, outside),
          f'{name}.{_ROUTER}': (tasks, splits * e),
        }
  undivided = [
    site
    for site in modules
    if any(math.prod(sizes) % splits for sizes in features[site])
  ]
  if undivided:
    raise CheckpointError(
      f'{path} has {splits} splits at {", ".join(undivided)}, whose sizes they '
      'do not divide: give the base model that the adapter was trained on'
    )
  weight_mapping.check(
    shapes,
    tensors.shapes,
    f'{path} does not fit the model',
    'give the base model that the adapter was trained on',
  )
  if not shapes:
    raise CheckpointError(f'{path} holds no arrays: save the adapter again')

  def fetch(name, shape):
    if name not in tensors.shapes:
      return np.zeros(shape, np.float32)
    array = tensors.fetch(name)
    weight_mapping.check_finite(name, array, path)
    return np.asarray(array, np.float32)

  arrays = {}
  for site, names in modules.items():
    inside, outside = features[site]
    i, o = (math.prod(axes) // splits for axes in features[site])
    layers = []
    for name in names:
      a = fetch(f'{name}.{_A}', (splits, e, i, rank)).transpose(0, 2, 1, 3)
      b = fetch(f'{name}.{_B}', (splits, e, rank, o)).transpose(1, 2, 0, 3)
      table = fetch(f'{name}.{_ROUTER}', (tasks, splits * e))
      layers.append(
        (
          a.reshape(*inside, e, rank),
          b.reshape(e, rank, *outside),
          np.pad(table, ((1, 0), (0, 0))),
        )
      )
    place = weight_mapping.path_in_layers(site).replace('{l}/', '')
    leaves = ('a', 'b', 'router/table')
    for leaf, stacked in zip(leaves, zip(*layers, strict=True), strict=True):
      arrays[f'{place}/{_INSTANCE}/{leaf}'] = np.stack(stacked)
  router = Spec(
    'poly', (('tasks', tuple(map(str, range(tasks)))), ('splits', splits))
  )
  options = {
    'experts': e,
    'rank': rank,
    'router': router,
    'targets': site_patterns(modules, features),
  }
  method = method_string.format_method(
    (Spec(_INSTANCE, tuple(options.items())),)
  )
  return AdapterWeights(method, weight_mapping.unflatten(arrays))


def write(
  config: Any, adapter: AdapterWeights
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(fields of adapter_config.json, arrays) of a `poly` or `mhr`.

  Raises:
    CheckpointError: peft has no such mixture.
  """
  family = hf.family_of(config)
  built = build(adapter.method, family.sites(config))
  mixture = built.adapter_map.entries[0][1]
  features, sites = _features(config), sites_in(adapter.tree, mixture.name)
  router, e = mixture.router, mixture.experts
  splits = getattr(router, 'splits', 1)
  is_poly = isinstance(router, Poly) and mixture.combine == 'parameters'
  has_more = (
    mixture.share or mixture.shared_experts or mixture.experts_per_layer
  )
  sizes = [math.prod(f) for site in sites for f in features.get(site, ((0,),))]
  divides = all(size and size % splits == 0 for size in sizes)
  if not is_poly or has_more or mixture.identity_experts or not divides:
    raise CheckpointError(
      f'peft cannot represent {adapter.method!r}: its Poly merges the '
      'parameters of LoRAs at projections, by task, in splits that divide all '
      'sizes; write the moepeft format instead'
    )
  rank, arrays = mixture.expert.rank, {}
  for site, leaves in sites.items():
    a, b, table = (
      np.asarray(leaves[n], np.float32) for n in ('a', 'b', 'router/table')
    )
    for layer, name in enumerate(_modules(config, site)):
      part_a = a[layer].reshape(splits, -1, e, rank).transpose(0, 2, 1, 3)
      # peft scales by 1 / r.
      part_b = b[layer].reshape(e, rank, splits, -1).transpose(2, 0, 1, 3)
      arrays[f'{name}.{_A}'] = part_a
      arrays[f'{name}.{_B}'] = part_b * np.float32(mixture.expert.scale * rank)
      arrays[f'{name}.{_ROUTER}'] = table[layer][1:]
  modules = {name.partition('.poly_')[0] for name in arrays}
  return {
    'peft_type': PEFT_TYPE,
    'poly_type': 'poly',
    'r': rank,
    'n_tasks': len(router.tasks),
    'n_skills': e,
    'n_splits': splits,
    'target_modules': sorted(name.removeprefix(PREFIX) for name in modules),
    # safetensors writes the memory of an array, whatever its strides.
  }, {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _features(
  config: Any,
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
  """{site: (its input's features, its output's)} of all projections."""
  family = hf.family_of(config)
  sizes = family.axis_sizes(config)
  return {
    site: tuple(tuple(sizes[letter] for letter in axes) for axes in pair)
    for site, pair in family.projections(config).items()
  }


def _modules(config: Any, site: str) -> list[str]:
  """The names of a site's modules, one for each layer."""
  depth = hf.family_of(config).depths(config)[site.split('/')[0]]
  module = site_module(config, site)
  return [f'{PREFIX}{module.replace("{l}", str(i))}' for i in range(depth)]
