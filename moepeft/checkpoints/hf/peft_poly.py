# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Poly of `peft`, which with splits is MHR.

peft has tasks by their numbers, from 0; they are read as the names '0', '1',
... At each module A is [splits, skills, in / splits, r], B [splits, skills, r,
out / splits], and the router [tasks, splits * skills], without the row of
padding. A layer that the adapter omits gets zeros.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The sizes of a Poly of `peft` and of one of its sites.

  Attributes:
    tasks, experts, splits, rank: of the adapter.
    inside, outside: the features of the site's input and output.
  """

  tasks: int
  experts: int
  splits: int
  rank: int
  inside: tuple[int, ...]
  outside: tuple[int, ...]

  @property
  def stored_shapes(self) -> dict[str, tuple[int, ...]]:
    """{name of an array in its module: shape in peft}."""
    # peft divides in the same way, and fails where the splits do not divide.
    inputs, outputs = (
      math.prod(features) // self.splits
      for features in (self.inside, self.outside)
    )
    return {
      _A: (self.splits, self.experts, inputs, self.rank),
      _B: (self.splits, self.experts, self.rank, outputs),
      _ROUTER: (self.tasks, self.splits * self.experts),
    }

  @property
  def are_divided(self) -> bool:
    sizes = math.prod(self.inside), math.prod(self.outside)
    return all(size % self.splits == 0 for size in sizes)

  def layer(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name in moepeft: array} of one module."""
    e, rank = self.experts, self.rank
    a = stored[_A].transpose(0, 2, 1, 3).reshape(*self.inside, e, rank)
    b = stored[_B].transpose(1, 2, 0, 3).reshape(e, rank, *self.outside)
    table = np.pad(stored[_ROUTER], ((1, 0), (0, 0)))
    if self.splits > 1:
      table = table.reshape(-1, self.splits, e)
    return {'a': a, 'b': b, 'router/table': table}


def read(
  path: str, config: Any, fields: Mapping[str, Any], tensors: directory.Tensors
) -> AdapterWeights:
  """Reads an adapter's method and float32 tree.

  Args: as of `peft_prompt.read`.

  Raises:
    CheckpointError: an array is missing or has a wrong shape, or there is none.
  """
  numbers = [fields[n] for n in ('n_tasks', 'n_skills', 'n_splits', 'r')]
  sites = {
    site: _Sizes(*numbers, *axes)
    for site, axes in _features(config).items()
    if any(f'{m}.{_A}' in tensors.shapes for m in _modules(config, site))
  }
  _check(path, config, sites, tensors)

  def fetch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors.shapes:
      return np.zeros(shape, np.float32)
    array = tensors.fetch(name)
    weight_mapping.check_finite(name, array, path)
    return np.asarray(array, np.float32)

  arrays = {}
  for site, sizes in sites.items():
    shapes = sizes.stored_shapes
    layers = [
      sizes.layer({n: fetch(f'{module}.{n}', s) for n, s in shapes.items()})
      for module in _modules(config, site)
    ]
    place = weight_mapping.path_in_layers(site).replace('{l}/', '')
    for leaf in layers[0]:
      stacked = np.stack([layer[leaf] for layer in layers])
      arrays[f'{place}/{_INSTANCE}/{leaf}'] = stacked
  tasks, e, splits, rank = numbers
  router = Spec(
    'poly', (('tasks', tuple(map(str, range(tasks)))), ('splits', splits))
  )
  targets = site_patterns(sites, _features(config))
  options = dict(experts=e, rank=rank, router=router, targets=targets)
  method = method_string.format_method(
    (Spec(_INSTANCE, tuple(options.items())),)
  )
  return AdapterWeights(method, weight_mapping.unflatten(arrays))


def _check(
  path: str,
  config: Any,
  sites: Mapping[str, _Sizes],
  tensors: directory.Tensors,
) -> None:
  """
  Raises:
    CheckpointError: as `read`.
  """
  undivided = [site for site, sizes in sites.items() if not sizes.are_divided]
  if undivided:
    raise CheckpointError(
      f'{path} has {sites[undivided[0]].splits} splits at '
      f'{", ".join(undivided)}, whose sizes they do not divide: give the base '
      'model that the adapter was trained on'
    )
  shapes = {
    f'{module}.{name}': shape
    for site, sizes in sites.items()
    for module in _modules(config, site)
    if f'{module}.{_A}' in tensors.shapes
    for name, shape in sizes.stored_shapes.items()
  }
  weight_mapping.check(
    shapes,
    tensors.shapes,
    f'{path} does not fit the model',
    'give the base model that the adapter was trained on',
  )
  if not shapes:
    raise CheckpointError(f'{path} holds no arrays: save the adapter again')


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
      arrays[f'{name}.{_ROUTER}'] = table[layer][1:].reshape(-1, splits * e)
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
