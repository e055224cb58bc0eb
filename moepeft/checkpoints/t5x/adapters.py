# SPDX-License-Identifier: Apache-2.0
"""Converts adapters of the code released with arXiv:2309.05444.

In the released code, adapters are modules of T5X's tree: `lora_q_conv/lora_A`,
`k_conv/mov_scaling`, `router/router_weights/v/kernel`. Names and shapes
determine method, experts and rank; alpha is a constant of the code.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from moepeft.checkpoints.adapter import (
  AdapterWeights,
  method_instances,
  site_patterns,
  sites_in,
)
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.models import weight_mapping
from moepeft.models.t5 import weights as t5_weights
from moepeft.models.t5.family import FAMILY
from moepeft.models.t5.model import T5Config
from moepeft.models.weight_mapping import (
  CheckpointError,
  Entry,
  Rule,
  Shape,
  Tree,
)

ALPHA = 16
METHODS = ('lora', 'molora', 'ia3', 'mov')

Fetch = Callable[[str], np.ndarray]


def is_adapter(name: str) -> bool:
  """Whether a T5X name belongs to an adapter of the released code."""
  return any(part.endswith('_conv') for part in name.split('/'))


def read(
  config: T5Config,
  shapes: Mapping[str, Shape],
  fetch: Fetch,
  top_k: int | None = None,
  path: str = 'the checkpoint',
) -> AdapterWeights | None:
  """Infers the method from names and shapes, and reads its tree.

  Args:
    shapes: {T5X name: shape} of the adapter arrays.
    top_k: k of the routers, without renormalization; None for all experts.
    path: the checkpoint, for messages.

  Raises:
    CheckpointError: arrays are missing, unknown or have another shape.
  """
  if not shapes:
    return None
  expected_shapes, specs, loaded_entries = {}, [], []
  for method in METHODS:
    modules = _modules(config, method, shapes)
    if modules:
      sizes = t5_weights.axis_sizes(config) | _sizes_from_t5x(
        method, modules, shapes
      )
      entries = _entries(config, method, modules, sizes)
      expected_shapes |= {e.stored_name: e.stored_shape for e in entries}
      specs.append(_spec(config, method, modules, sizes, top_k))
      loaded_entries.append((entries, sizes))
  weight_mapping.check(
    expected_shapes,
    shapes,
    "the adapter arrays are not the released code's",
    'convert the base alone, or rename the arrays',
  )
  flat = {}
  for entries, sizes in loaded_entries:
    # Adapters train in float32.
    flat |= weight_mapping.flatten(
      weight_mapping.read(entries, sizes, fetch, np.float32, path)[0]
    )
  text = method_string.format_method(tuple(specs))
  return AdapterWeights(text, weight_mapping.unflatten(flat))


def write(
  config: T5Config, adapter: AdapterWeights
) -> Iterator[tuple[Entry, np.ndarray]]:
  """Yields the arrays of an adapter with their released names.

  Raises:
    CheckpointError: the released code lacks the method, an option or a site.
  """
  flat, written = weight_mapping.flatten(adapter.tree), 0
  for instance, spec in method_instances(adapter.method).items():
    _check_released(instance, spec)
    instance_leaves = {
      n: leaf for n, leaf in flat.items() if f'/{instance}/' in n
    }
    adapter_sites = sites_in(adapter.tree, instance)
    released_places = places(config, spec.name)
    modules = {
      module: site
      for module, site in released_places.items()
      if site in adapter_sites
    }
    unsupported = sorted(set(adapter_sites) - set(modules.values()))
    if unsupported:
      raise CheckpointError(
        f'the released code has no {spec.name} at {", ".join(unsupported)}; '
        f'its sites are {", ".join(released_places.values())}'
      )
    sizes = t5_weights.axis_sizes(config) | _sizes_from_tree(adapter_sites)
    entries = _entries(config, spec.name, modules, sizes)
    yield from weight_mapping.write(
      entries, sizes, weight_mapping.unflatten(instance_leaves)
    )
    written += len(instance_leaves)
  if written != len(flat):
    raise CheckpointError(
      f'the tree has arrays that {adapter.method!r} lacks: write it with the '
      'method that it was trained with'
    )


def places(config: T5Config, method: str) -> dict[str, str]:
  """{module of the released code: site} of a method.

  'encoder/layers_{l}/attention/k_conv' -> 'encoder/self/k'.
  """
  low_rank = method in ('lora', 'molora')
  if low_rank:
    gate = 'wi_0' if config.gated else 'wi'
    attention = {f'lora_{x}_conv': x for x in 'qkv'} | {'lora_output_conv': 'o'}
    mlp = {'lora_intermediate_conv': gate, 'lora_output_conv': 'wo'}
  else:
    attention = {'k_conv': 'k', 'v_conv': 'v'}
    mlp = {'intermediate_conv': 'act'}
  return {
    f'{stack}/layers_{{l}}/{t5x_name}/{module}': f'{stack}/{sub}/{name}'
    for stack, subs in t5_weights.SUBLAYERS.items()
    for sub, (_, t5x_name) in subs.items()
    for module, name in (mlp if sub == 'mlp' else attention).items()
  }


def rules(
  config: T5Config, method: str, module: str, site: str
) -> tuple[Rule, ...]:
  """The rules of an adapter of the released code, with the letters e and r.

  Args:
    method: 'lora', 'molora', 'ia3' or 'mov'.
    module, site: an item of `places`.
  """
  input_axes, output_axes = (
    FAMILY.projections(config) | FAMILY.activations(config)
  )[site]
  router = f'({input_axes})e'
  # In attention, heads share a router kernel, and scales start with axis n.
  scale_axes, router_axes = (
    ('neh', 'he') if output_axes == 'nh' else ('ef', 'fe')
  )
  name = 'router/router_weights/v/kernel'
  table = {
    'lora': (
      ('a', 'lora_A', f'{input_axes}r', f'({input_axes})r'),
      ('b', 'lora_B', f'r{output_axes}', f'r({output_axes})'),
    ),
    'molora': (
      ('a', 'lora_A', f'{input_axes}er', f'e({input_axes})r'),
      ('b', 'lora_B', f'er{output_axes}', f'er({output_axes})'),
      ('router/kernel', name, router, router),
    ),
    'ia3': (('scale', 'ia3_scaling', output_axes, output_axes),),
    'mov': (
      ('scale', 'mov_scaling', f'e{output_axes}', scale_axes),
      ('router/kernel', name, router_axes, router_axes),
    ),
  }
  instance_path = f'{weight_mapping.path_in_layers(site)}/{method}'
  return tuple(
    Rule(f'{instance_path}/{leaf}', f'{module}/{t5x_leaf}', axes, t5x_axes)
    for leaf, t5x_leaf, axes, t5x_axes in table[method]
  )


def _modules(
  config: T5Config, method: str, shapes: Mapping[str, Shape]
) -> dict[str, str]:
  """The items of `places` that have arrays in a checkpoint."""
  modules = set()
  for name, shape in shapes.items():
    name = re.sub(r'/layers_\d+/', '/layers_{l}/', name)
    module, _, leaf = name.rpartition('/')
    low_rank = 'lora' if len(shape) == 2 else 'molora'
    leaves = {'lora_A': low_rank, 'ia3_scaling': 'ia3', 'mov_scaling': 'mov'}
    if leaves.get(leaf) == method:
      modules.add(module)
  released_places = places(config, method)
  return {
    module: site
    for module, site in released_places.items()
    if module in modules
  }


def _sizes_from_t5x(
  method: str, modules: Mapping[str, str], shapes: Mapping[str, Shape]
) -> dict[str, int]:
  """The sizes of the letters e and r, from a T5X array of the method."""
  leaf = {'ia3': 'ia3_scaling', 'mov': 'mov_scaling'}.get(method, 'lora_A')
  heads = f'{next(iter(modules))}/{leaf}'
  pattern = re.escape(heads).replace(re.escape('{l}'), r'\d+')
  shape = next(s for name, s in shapes.items() if re.fullmatch(pattern, name))
  # mov_scaling is [n, e, h] or [e, f], lora_A [e, in, r] or [in, r].
  expert = shape[-2] if method == 'mov' else shape[0]
  return {'e': expert, 'r': shape[-1]}


def _sizes_from_tree(adapter_sites: Mapping[str, Tree]) -> dict[str, int]:
  """The sizes of the letters e and r, from moepeft's arrays [l, ...]."""
  leaves = next(iter(adapter_sites.values()), {})
  if 'a' in leaves:
    return {'e': leaves['a'].shape[-2], 'r': leaves['a'].shape[-1]}
  return {'e': leaves['scale'].shape[1]} if 'scale' in leaves else {}


def _entries(
  config: T5Config,
  method: str,
  modules: Mapping[str, str],
  sizes: Mapping[str, int],
) -> tuple[Entry, ...]:
  adapter_rules = [
    rule
    for module, site in modules.items()
    for rule in rules(config, method, module, site)
  ]
  return weight_mapping.entries(adapter_rules, sizes, t5_weights.depths(config))


def _spec(
  config: T5Config,
  method: str,
  modules: Mapping[str, str],
  sizes: Mapping[str, int],
  top_k: int | None,
) -> Spec:
  """The spec of the method in the released code, with all options."""
  sites = FAMILY.projections(config) | FAMILY.activations(config)
  targets = site_patterns(modules.values(), sites)
  router = ('router', Spec('softmax'))
  if top_k is not None:
    router = ('router', Spec('topk', (('k', top_k), ('renormalize', False))))
  experts, rank = ('experts', sizes['e']), ('rank', sizes['r'])
  options = {
    'lora': (rank, ('alpha', ALPHA)),
    'molora': (experts, rank, ('alpha', ALPHA), router),
    'ia3': (),
    'mov': (experts, router, ('reads', 'heads')),
  }
  return Spec(method, (*options[method], ('targets', targets)))


def _check_released(instance: str, spec: Spec) -> None:
  """Raises a CheckpointError for options that the released code lacks."""
  router = spec.get('router', Spec('softmax'))
  router = Spec(router) if isinstance(router, str) else router
  # Dropout and jitter affect training only.
  refused = {
    f'{spec.name} as {instance}': instance not in METHODS,
    f'alpha={spec.get("alpha")}': spec.get('alpha', ALPHA) != ALPHA,
    'rslora': spec.get('rslora', False),
    "on='input'": spec.get('on', 'output') != 'output',
    'experts_per_layer': spec.get('experts_per_layer') is not None,
    f'reads={spec.get("reads")!r}': spec.get('reads', 'heads') != 'heads',
    f'the router {router}': router.name not in ('softmax', 'topk')
    or router.get('renormalize', False),
  }
  unsupported_options = [option for option, is_set in refused.items() if is_set]
  if unsupported_options:
    raise CheckpointError(
      f'the released code has no {unsupported_options[0]}: its T5X checkpoints '
      f'have one each of {", ".join(METHODS)}, with alpha {ALPHA}; write the '
      'moepeft format instead'
    )
