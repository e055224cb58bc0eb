# SPDX-License-Identifier: Apache-2.0
"""Initializes the experts of a mixture from trained adapters.

mixture(from_adapters=['runs/a/adapter.safetensors', 'runs/b'], router=softmax)

The files determine the experts' method, its options and the sites; expert i
has the arrays of adapter i. Methods that train a router over frozen adapters:
X-LoRA (arXiv:2402.07148), PHATGOOSE (arXiv:2402.05859), Arrow
(arXiv:2405.11157).
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from moepeft.checkpoints import adapter as adapter_lib
from moepeft.checkpoints.open_adapter import (
  StoredAdapter,
  check_base,
  load_adapter,
  resolve,
)
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.core import files
from moepeft.core.ranges import Texts
from moepeft.core.types import AXIS_NAMES, Tree
from moepeft.models import weight_mapping
from moepeft.moe import ROUTERS, RouterSpec
from moepeft.nn.initializers import ParamMetadata
from moepeft.peft import Built, build
from moepeft.peft.build import adapter_function
from moepeft.peft.method import options_of
from moepeft.peft.method_text import (
  flatten_expert,
  method_entry,
  nest_expert,
)
from moepeft.peft.methods import METHODS
from moepeft.peft.mixture import Mixture, can_be_expert

# The files of an adapter's arrays, of moepeft and of peft.
_FILES = (adapter_lib.ARRAYS, 'adapter_model.safetensors')


@dataclasses.dataclass(frozen=True)
class _TrainedExpert:
  """A trained adapter that becomes an expert.

  Attributes:
    path: the path in the method string.
    sha256: the hash of the file of its arrays.
    adapter: the adapter's method and arrays.
    spec: the spec of its method, without its sites.
    module: its unbound adapter module.
    name: the name of its arrays in the adapter's tree.
    gated: whether the adapter is a mixture of this expert alone, with a router.
    sites: the paths that it adapts.
  """

  path: str
  sha256: str
  adapter: StoredAdapter
  spec: Spec
  module: nn.Module
  name: str
  gated: bool
  sites: tuple[str, ...]


def resolve_method(method: str, sites: Mapping[str, str], config: Any) -> str:
  """Adds the options that the files of `from_adapters` determine to a method.

  Args:
    method: the method string; no file is read if it has `expert` and `targets`.
    sites: {path: role} of the model.
    config: the model's config.

  Raises:
    ValueError: a file does not exist or holds no adapter that can be an expert,
      or the adapters differ in their method or sites.
  """
  if not reads_files(method):
    return method
  specs = []
  for spec in map(flatten_expert, method_string.parse_method(method)):
    options = dict(spec.options)
    paths = options.get('from_adapters')
    if not _needs_files(spec):
      specs.append(spec)
      continue
    Texts().check(f"{spec.name}'s option from_adapters", paths)
    experts = [_read_expert(path, sites, config) for path in paths]
    first = experts[0]
    for expert in experts[1:]:
      _check_same_function(first, expert)
    file_options = dict(first.spec.options)
    if METHODS[spec.name].expert is None:
      file_options['expert'] = first.spec.name
    # A preset has other defaults than the method of the files.
    for name, option in METHODS[spec.name].options().items():
      value = getattr(first.module, name, option.default)
      if not option.training_only and value != option.default:
        file_options[name] = value
    file_options['targets'] = '|'.join(first.sites)
    specs.append(
      nest_expert(Spec(spec.name, tuple((file_options | options).items())))
    )
  return method_string.format_method(tuple(specs))


def reads_files(method: str) -> bool:
  """Whether `resolve_method` reads files for a method string."""
  return any(
    map(_needs_files, map(flatten_expert, method_string.parse_method(method)))
  )


def _needs_files(spec: Spec) -> bool:
  """Whether a mixture needs its files to determine its expert or sites."""
  options = dict(spec.options)
  if spec.name not in METHODS or not options.get('from_adapters'):
    return False
  needs_expert = METHODS[spec.name].expert is None and 'expert' not in options
  return needs_expert or 'targets' not in options


def has_trained_experts(built: Built) -> bool:
  """
  Raises:
    ValueError: a router is computed from trained adapters, and has none.
  """
  for _, adapter in built.adapter_map.entries:
    router = getattr(adapter, 'router', None)
    is_computed = router and _router_entry(router).from_experts
    if is_computed and not adapter.from_adapters:
      raise ValueError(
        f'{adapter.name} has a router that is computed from trained adapters; '
        f"name them, {adapter.name}(from_adapters=['a', 'b'])"
      )
  return bool(_mixtures(built))


def _router_entry(router: nn.Module) -> RouterSpec:
  return next(r for r in ROUTERS.values() if r.module is type(router))


def load_experts(
  peft: Tree,
  metadata: Mapping[str, tuple[tuple[int, ...], ParamMetadata]],
  built: Built,
  base: Any,
) -> tuple[Tree, list[dict[str, str]]]:
  """Reads the experts of every mixture that has `from_adapters`.

  Args:
    peft: the initial 'peft' tree.
    metadata: {path: (shape, metadata)} of that tree.
    base: a `moepeft.checkpoints.base.Base`.

  Returns:
    The tree with the adapters' arrays as experts, and for each adapter
    {'path', 'sha256' of its file}.

  Raises:
    ValueError: a file does not exist, or its adapter was trained on another
      base or differs from the mixture's expert.
  """
  arrays, records = weight_mapping.flatten(peft), []
  sites = base.family.sites(base.config)
  for name, mixture in _mixtures(built).items():
    mixture_sites = tuple(
      path for path, a in built.adapter_map.entries if a.name == name
    )
    experts = [
      _read_expert(path, sites, base.config) for path in mixture.from_adapters
    ]
    for expert in experts:
      check_base(expert.adapter, expert.path, base)
      _check_is_expert(expert, mixture, mixture_sites)
      _check_gate(expert, mixture)
    records += [{'path': e.path, 'sha256': e.sha256} for e in experts]
    axes = {
      path: param_metadata.logical_axes.index(AXIS_NAMES['e'])
      for path, (_, param_metadata) in metadata.items()
      if f'/{name}/' in path and f'/{name}/router/' not in path
    }
    for path, axis in axes.items():
      arrays[path] = np.stack(
        [
          _expert_array(expert, path, name, metadata[path][0], axis)
          for expert in experts
        ],
        axis,
      )
    arrays |= _router_arrays(mixture, name, arrays, axes, metadata, experts)
  return weight_mapping.unflatten(arrays), records


def _router_arrays(
  mixture: Mixture,
  name: str,
  arrays: Mapping[str, np.ndarray],
  axes: Mapping[str, int],
  metadata: Mapping[str, tuple[tuple[int, ...], ParamMetadata]],
  trained_experts: Sequence[_TrainedExpert],
) -> dict[str, np.ndarray]:
  """{path: array} of the routers that are computed from the experts.

  Args:
    axes: {path: axis of the experts} of the experts' arrays.
  """
  entry = _router_entry(mixture.router)
  if entry.from_experts is None:
    return {}
  sites: dict[str, dict[str, np.ndarray]] = {}
  for path, axis in axes.items():
    site, _, leaf = path.partition(f'/{name}/')
    stacked = metadata[path][1].logical_axes[0] == AXIS_NAMES['l']
    array = np.moveaxis(arrays[path], axis, int(stacked))
    experts = sites.setdefault(site, {})
    experts[leaf] = array if stacked else array[None]
    if entry.reads_gates:
      gates = np.stack([_gate(e, site) for e in trained_experts], -2)
      experts['gate'] = gates if stacked else gates[None]
  result = {}
  for site, experts in sites.items():
    layers = [
      entry.from_experts({leaf: array[i] for leaf, array in experts.items()})
      for i in range(len(next(iter(experts.values()))))
    ]
    for leaf in layers[0]:
      path = f'{site}/{name}/router/{leaf}'
      if path not in metadata:
        # Another site of the layer has the router.
        continue
      stacked = np.stack([layer[leaf] for layer in layers])
      result[path] = stacked.reshape(metadata[path][0])
  return result


def _mixtures(built: Built) -> dict[str, Mixture]:
  """{name in the tree: mixture whose experts are trained adapters}."""
  return {
    adapter.name: adapter
    for _, adapter in built.adapter_map.entries
    if getattr(adapter, 'from_adapters', ())
  }


def _read_expert(
  path: str, sites: Mapping[str, str], config: Any
) -> _TrainedExpert:
  folder = Path(resolve(path))
  if folder.name in _FILES:
    folder = folder.parent
  file = next((folder / n for n in _FILES if (folder / n).is_file()), None)
  if file is None:
    raise ValueError(
      f'from_adapters: {path} holds no {" or ".join(_FILES)}; name an exported '
      'adapter (python -m moepeft.convert --workdir=RUN --output=DIR makes one '
      'of a run)'
    )
  adapter = load_adapter(str(folder), config)
  specs = [
    flatten_expert(s) for s in method_string.parse_method(adapter.method)
  ]
  spec, entry = specs[0], method_entry(specs[0])
  built = build(adapter.method, sites, adapter.semantics or 'official')
  entries = built.adapter_map.entries
  module = stored_module = entries[0][1] if entries else None
  gated = getattr(module, 'experts', 0) == 1
  if gated:
    module, entry = module.expert, entry.expert
  if len(specs) > 1 or not can_be_expert(entry):
    names = ', '.join(name for name in METHODS if can_be_expert(METHODS[name]))
    raise ValueError(
      f'from_adapters: {path} holds {adapter.method!r}, but an expert is one '
      f'adapter of {names}; name another'
    )
  options = tuple(
    (name, getattr(module, name))
    for name, option in options_of(entry.module).items()
    if not option.training_only
    and (spec.get(name) is not None or getattr(module, name) != option.default)
  )
  return _TrainedExpert(
    path,
    hashlib.sha256(files.read_bytes(str(file))).hexdigest(),
    adapter,
    Spec(next(n for n, m in METHODS.items() if m is entry), options),
    module,
    stored_module.name,
    gated,
    tuple(path for path, _ in entries),
  )


def _check_same_function(first: _TrainedExpert, second: _TrainedExpert) -> None:
  is_same = adapter_function(first.module) == adapter_function(second.module)
  if not is_same or first.sites != second.sites:
    raise ValueError(
      f'from_adapters takes adapters of one method, with the same options and '
      f'sites; {first.path} is {first.adapter.method!r}, {second.path} is '
      f'{second.adapter.method!r}: leave one out, or train it again'
    )


def _check_is_expert(
  expert: _TrainedExpert, mixture: Mixture, sites: tuple[str, ...]
) -> None:
  is_same = adapter_function(expert.module) == adapter_function(mixture.expert)
  if not is_same or expert.sites != sites:
    raise ValueError(
      f'{mixture.name}: {expert.path} is {expert.adapter.method!r}, which '
      "differs from the mixture's expert; leave out `expert`, its options and "
      '`targets` to read them from the files'
    )


def _check_gate(expert: _TrainedExpert, mixture: Mixture) -> None:
  if expert.gated == _router_entry(mixture.router).reads_gates:
    return
  if expert.gated:
    raise ValueError(
      f'{mixture.name}: {expert.path} is {expert.adapter.method!r}, a mixture '
      'of one expert, whose router this one would drop; name the adapter that '
      'the expert was, or router=phatgoose'
    )
  raise ValueError(
    f'{mixture.name} routes by the gates of adapters, and {expert.path} has '
    f"none; train one, mixture(from_adapters=['{expert.path}'], "
    'router=sigmoid(kernel_init=zeros)), and name its export'
  )


def _gate(expert: _TrainedExpert, site: str) -> np.ndarray:
  """The gate of an expert at a site, [i] or [l, i]."""
  arrays = weight_mapping.flatten(expert.adapter.tree)
  return np.asarray(arrays[f'{site}/{expert.name}/router/kernel'])[..., 0]


def _expert_array(
  expert: _TrainedExpert,
  path: str,
  name: str,
  shape: tuple[int, ...],
  axis: int,
) -> np.ndarray:
  """The adapter's array for a path of the mixture, without the expert axis.

  Raises:
    ValueError: the array is missing or has another shape.
  """
  adapter_path = path.replace(f'/{name}/', f'/{expert.name}/')
  array = weight_mapping.flatten(expert.adapter.tree).get(adapter_path)
  if expert.gated and array is not None and array.shape[axis] == 1:
    array = array.squeeze(axis)
  expected = shape[:axis] + shape[axis + 1 :]
  if array is None or array.shape != expected:
    shape_read = 'none' if array is None else array.shape
    raise ValueError(
      f'from_adapters: {expert.path} was made for another model: expected an '
      f'array {adapter_path} of {expected}, got {shape_read}'
    )
  return np.asarray(array, np.float32)
