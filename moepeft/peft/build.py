# SPDX-License-Identifier: Apache-2.0
"""Builds the adapters of a method string for one model."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.config.ranges import SEMANTICS
from moepeft.core.ranges import Choices, Range, shortened, suggestion
from moepeft.core.types import State, Tree
from moepeft.moe import DEFAULT_ROUTER, ROUTERS
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.method import Method
from moepeft.peft.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Built:
  """A method made ready for one model.

  Attributes:
    method: its text, with every option that the semantics decides.
    semantics: 'official' or 'paper'.
    adapter_map: the adapters of each site, for the model.
    trainable: the collection that training changes, 'peft' or 'params'.
  """

  method: str
  semantics: str
  adapter_map: AdapterMap
  trainable: str

  def variables(self, state: State) -> dict[str, Tree]:
    """{'params': ..., 'peft': ...} of a training state; its 'reference'."""
    frozen = {'peft': 'params', 'params': 'peft'}[self.trainable]
    variables = {self.trainable: state.trainable, frozen: state.frozen}
    return variables | (
      {'reference': state.reference} if state.reference else {}
    )


def build(
  method: str,
  sites: Mapping[str, str],
  semantics: str = 'official',
  methods: Mapping[str, Method] = METHODS,
) -> Built:
  """Resolves a method's names for a model.

  Args:
    method: 'molora(experts=10, rank=4)'; several joined by ' + ' nest, the
      first innermost. Every adapter takes the option `sites`: globs over site
      paths joined by '|', as in '*/self/q|*/wo'.
    sites: {path: role} of the model, from `models.<family>.sites`.
    semantics: decides what the text leaves open; DESIGN: official is the
      released code, paper the text.
    methods: the registry.

  Raises:
    ValueError: a name, option or semantics does not exist, or a pattern
      matches no site.
  """
  if semantics not in SEMANTICS:
    raise ValueError(
      f'semantics is one of {", ".join(SEMANTICS)}; got {semantics!r}'
    )
  specs = [
    _resolve(spec, methods, semantics)
    for spec in method_string.parse_method(method)
  ]
  text = method_string.format_method(tuple(specs))
  if any(methods[spec.name].module is None for spec in specs):
    if len(specs) > 1:
      raise ValueError(f'{method!r}: full trains alone; drop the others')
    return Built(text, semantics, AdapterMap(), 'params')
  entries, names = [], set()
  for spec in specs:
    if methods[spec.name].once and [s.name for s in specs].count(spec.name) > 1:
      raise ValueError(
        f'{method!r}: {spec.name} can stand only once; make one longer'
      )
    name = _free_name(spec.name, names)
    adapter = _module(spec, methods[spec.name], name)
    entries += [
      (path, adapter)
      for path in _paths(spec, methods[spec.name], sites, semantics)
    ]
  return Built(text, semantics, AdapterMap(tuple(entries)), 'peft')


def routers(method: str, semantics: str = 'official') -> dict[str, nn.Module]:
  """{adapter's name: its router} of a method, without those that have none.

  Raises:
    ValueError: as `build`.
  """
  result, names = {}, set()
  for spec in method_string.parse_method(method):
    spec = _resolve(spec, METHODS, semantics)
    if METHODS[spec.name].module is None:
      continue
    name = _free_name(spec.name, names)
    router = getattr(_module(spec, METHODS[spec.name], name), 'router', None)
    if router is not None:
      result[name] = router
  return result


def plain(
  method: str,
  semantics: str = 'official',
  methods: Mapping[str, Method] = METHODS,
) -> str:
  """A method's text without the modules' defaults, its options in order.

  Two texts of one method have the same: 'lora(alpha=16.0, rank=8)' and
  'lora(rank=8)'; what the semantics decides is said.

  Raises:
    ValueError: as `build`.
  """
  specs = []
  for spec in method_string.parse_method(method):
    spec = _resolve(spec, methods, semantics)
    module = methods[spec.name].module
    options = _unusual(spec, _defaults(module))
    router = options.pop('router', None)
    if router is not None:
      router_options = _unusual(router, _defaults(ROUTERS[router.name].module))
      router = Spec(router.name, tuple(sorted(router_options.items())))
      options |= {'router': router} if router != Spec(DEFAULT_ROUTER) else {}
    specs.append(Spec(spec.name, tuple(sorted(options.items()))))
  return method_string.format_method(tuple(specs))


def _unusual(spec: Spec, usual: Mapping[str, Any]) -> dict[str, Any]:
  missing = object()
  return {k: v for k, v in spec.options if usual.get(k, missing) != v}


def function_of(adapter_map: AdapterMap) -> tuple:
  """The function of the adapters in evaluation, as a value to compare.

  Two texts of one function are equal: defaults written out or not, sites by
  role or by name, another dropout or jitter.
  """
  return tuple(
    (path, _function(adapter)) for path, adapter in adapter_map.entries
  )


def _function(module: nn.Module) -> tuple:
  fields = []
  for name in sorted(_defaults(module).keys() - training_only(module)):
    value = getattr(module, name)
    nested = isinstance(value, nn.Module)
    fields.append((name, _function(value) if nested else value))
  return (type(module), *fields)


def _resolve(spec: Spec, methods, semantics: str) -> Spec:
  """Checks names and options and adds what the semantics decides."""
  method = _find(spec.name, methods, 'method')
  options = dict(spec.options)
  decided = dict(method.defaults.get(semantics, {}))
  defaults = _defaults(method.module)
  if 'router' in defaults:
    router = options.get('router', DEFAULT_ROUTER)
    router = Spec(router) if isinstance(router, str) else router
    if not isinstance(router, Spec):
      raise ValueError(
        f'{spec.name}: a router is written like softmax or topk(k=2); got '
        f'{router!r}'
      )
    entry = _find(router.name, ROUTERS, 'router')
    router_defaults = _defaults(entry.module)
    router_defaults.pop('experts')
    _check(router, entry.module, router_defaults)
    for option, value in entry.defaults.get(semantics, {}).items():
      if router.get(option) is None:
        router = router.replace(**{option: value})
    decided['router'] = options['router'] = router
  _check(spec, method.module, defaults | ({'sites': ''} if defaults else {}))
  return Spec(spec.name, tuple((options | (decided | options)).items()))


def _module(spec: Spec, method: Method, name: str):
  options = {k: v for k, v in spec.options if k != 'sites'}
  if 'router' in options:
    router = options['router']
    experts = options.get('experts', method.module.experts)
    options['router'] = ROUTERS[router.name].module(
      experts=experts, **dict(router.options), parent=None
    )
  return method.module(name=name, parent=None, **options)


def _paths(spec, method, sites, semantics) -> list[str]:
  """The sites that a spec adapts, in the model's order."""
  patterns = spec.get('sites')
  if patterns is None:
    roles = method.roles[semantics]
    paths = [path for path, role in sites.items() if role in roles]
    if not paths:
      raise ValueError(f'{spec.name} finds no site; name some with `sites`')
    return paths
  paths = set()
  for pattern in patterns.split('|'):
    matched = fnmatch.filter(sites, pattern.strip())
    if not matched:
      raise ValueError(
        f'{spec.name}: the pattern {pattern!r} matches no site; the sites '
        f'are {", ".join(sites)}'
      )
    paths |= set(matched)
  return [path for path in sites if path in paths]


def _defaults(module) -> dict[str, Any]:
  """{option: default} of an adapter's or router's module; None has none."""
  if module is None:
    return {}
  return {
    field.name: field.default
    for field in dataclasses.fields(module)
    if field.name not in ('parent', 'name')
  }


def allowed(module) -> dict[str, Range | Choices]:
  """{option: the values that it may take}, as its field declares them."""
  return {
    field.name: field.metadata['allowed']
    for field in (dataclasses.fields(module) if module else ())
    if 'allowed' in field.metadata
  }


def training_only(module) -> set[str]:
  """The options that change the noise of training and nothing else."""
  return {
    field.name
    for field in (dataclasses.fields(module) if module else ())
    if field.metadata.get('training_only')
  }


def _check(spec: Spec, module, defaults: Mapping[str, Any]) -> None:
  """Raises a ValueError for an option that is not there or cannot be."""
  unknown = sorted(set(dict(spec.options)) - set(defaults))
  if unknown:
    raise ValueError(
      f'{spec.name} has no option {", ".join(unknown)}; it has '
      f'{", ".join(sorted(defaults)) or "none"}'
      f'{suggestion(unknown[0], defaults)}'
    )
  ranges = allowed(module)
  for option, value in spec.options:
    default = defaults[option]
    if isinstance(default, nn.Module):
      continue
    expected = type(default)
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (
      isinstance(value, bool) and expected is not bool
    ):
      raise ValueError(
        f"{spec.name}'s option {option} is of type {expected.__name__}; got "
        f'{shortened(value)}'
      )
    if option in ranges:
      ranges[option].check(f"{spec.name}'s option {option}", value)


def _find(name: str, registry, kind: str):
  if name not in registry:
    raise ValueError(
      f'there is no {kind} {name!r}; there are {", ".join(registry)}'
      f'{suggestion(name, registry)}'
    )
  return registry[name]


def _free_name(name: str, taken_names: set[str]) -> str:
  """lora, lora_2, lora_3: adapters of one name stay apart."""
  free, i = name, 2
  while free in taken_names:
    free, i = f'{name}_{i}', i + 1
  taken_names.add(free)
  return free
