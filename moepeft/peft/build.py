# SPDX-License-Identifier: Apache-2.0
"""Builds the adapters of a method string for one model."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

import flax.linen as nn
import optax

from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.core.types import State, Tree
from moepeft.moe import ROUTERS
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft.kinds import KindsMethod
from moepeft.peft.method import Method, options_of
from moepeft.peft.method_text import (
  format_specs,
  method_entry,
  option_values,
  resolve,
)
from moepeft.peft.methods import METHODS
from moepeft.peft.mixture import largest_count


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

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    """Regular expressions of the paths in 'peft' that stay as they are."""
    patterns = {
      f'/{adapter.name}/{arrays}': None
      for _, adapter in self.adapter_map.entries
      for arrays in getattr(adapter, 'frozen_arrays', ())
    }
    return tuple(patterns)

  @property
  def down_arrays(self) -> tuple[str, ...]:
    """Regular expressions of the paths of mixtures' down-projections."""
    patterns = {
      f'/{adapter.name}/{arrays}': None
      for _, adapter in self.adapter_map.entries
      for arrays in getattr(adapter, 'down_arrays', ())
    }
    return tuple(patterns)

  @property
  def unread_arrays(self) -> dict[str, float]:
    """{regular expression of paths: the share that no adapter reads}."""
    return {
      f'/{adapter.name}/{arrays}': share
      for _, adapter in self.adapter_map.entries
      for arrays, share in getattr(adapter, 'unread_arrays', {}).items()
    }

  @property
  def tied_arrays(self) -> dict[str, int]:
    """As `peft.tied_layers.tie` takes them."""
    return {
      f'/{adapter.name}/{arrays}': groups
      for _, adapter in self.adapter_map.entries
      for arrays, groups in getattr(adapter, 'tied_arrays', {}).items()
    }

  def wrap_optimizer(
    self, optimizer: optax.GradientTransformation, steps: int
  ) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`, with what adapters add to it.

    Raises:
      ValueError: an adapter does not fit the number of steps.
    """
    for adapter in dict(
      (adapter.name, adapter) for _, adapter in self.adapter_map.entries
    ).values():
      if wrap := getattr(adapter, 'wrap_optimizer', None):
        optimizer = wrap(optimizer, steps)
    return optimizer

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
      first innermost. Every adapter takes the option `targets`: globs over site
      paths joined by '|', as in '*/self/q|*/wo'.
    sites: {path: role} of the model, from `models.<family>.sites`.
    semantics: decides what the text leaves open; DESIGN: official is the
      released code, paper the text.
    methods: the registry.

  Raises:
    ValueError: a name, option or semantics does not exist, or a pattern
      matches no site.
  """
  specs = resolve(method, semantics, methods)
  text = format_specs(specs, methods)
  if any(methods[spec.name].module is None for spec in specs):
    if len(specs) > 1:
      raise ValueError(f'{method!r}: full trains alone; drop the others')
    return Built(text, semantics, AdapterMap(), 'params')
  single = [spec.name for spec in specs if methods[spec.name].once]
  if len(single) > 1:
    names = ' or '.join(dict.fromkeys(single))
    raise ValueError(
      f'{method!r}: {names} can stand only once; make one longer'
    )
  entries, names, replaced = [], set(), {}
  for spec in specs:
    method = method_entry(spec, methods)
    adapter = make_adapter(spec, unique_name(spec.name, names), methods)
    placed = _placed(adapter, spec, method, sites, semantics)
    paths = [path for path, _ in placed]
    _check_router(spec, paths)
    _check_two_pass(adapter, sites)
    entries += placed
    replaced |= {f'{p}/{s}': spec.name for p in paths for s in method.replaces}
  for path, adapter in entries:
    if path in replaced:
      raise ValueError(
        f'{replaced[path]} has an activation of its own in place of the one at '
        f'{path}, where {adapter.name} is; drop one of them, or name other '
        'sites with `targets`'
      )
  return Built(text, semantics, AdapterMap(tuple(entries)), 'peft')


def routers(method: str, semantics: str = 'official') -> dict[str, nn.Module]:
  """{adapter's name: its router} of a method, without those that have none.

  Raises:
    ValueError: as `build`.
  """
  result, names = {}, set()
  for spec in resolve(method, semantics):
    if METHODS[spec.name].module is None:
      continue
    name = unique_name(spec.name, names)
    router = getattr(make_adapter(spec, name), 'router', None)
    if router is not None:
      result[name] = router
  return result


def function_of(adapter_map: AdapterMap) -> tuple:
  """The function of the adapters in evaluation, as a value to compare.

  Two texts of one function are equal: defaults written out or not, sites by
  role or by name, another dropout or jitter.
  """
  return tuple(
    (path, adapter_function(adapter)) for path, adapter in adapter_map.entries
  )


def adapter_function(module: nn.Module) -> tuple:
  """As `function_of`, of one adapter or router."""
  options = options_of(type(module))
  names = sorted(n for n, o in options.items() if not o.training_only)
  fields = ((name, _value_function(getattr(module, name))) for name in names)
  return (type(module), *fields)


def _value_function(value):
  """A field's value, with the functions of the modules in it."""
  if isinstance(value, nn.Module):
    return adapter_function(value)
  if isinstance(value, tuple):
    return tuple(map(_value_function, value))
  return value


def make_adapter(
  spec: Spec, name: str, methods: Mapping[str, Method] = METHODS
) -> nn.Module:
  """The unbound adapter of a flat spec that was resolved.

  Args:
    name: its entry in the 'peft' tree.
  """
  method = method_entry(spec, methods)
  options = {k: v for k, v in spec.options if k not in ('targets', 'expert')}
  declared = method.options()
  if 'router' in declared:
    router = options.get('router') or method_string.parse(method.router)
    values = option_values(spec, method)
    counts = values.get('experts_per_layer', ())
    kinds = len(getattr(method.expert, 'kinds', ())) or 1
    options['experts'] = (
      len(values.get('from_adapters', ()))
      or len(values.get('ranks', ()))
      or largest_count(counts)
      or values['experts'] * kinds
    )
    if values.get('ranks'):
      options['rank'] = max(values['ranks'])
    if 'experts_per_layer' in declared:
      options['experts_per_layer'] = counts
    options['router'] = ROUTERS[router.name].module(
      experts=options['experts'] + values.get('identity_experts', 0),
      **dict(router.options),
      parent=None,
    )
  return method.make(name, **options)


def _check_router(spec: Spec, paths: Sequence[str]) -> None:
  """Raises ValueError where a router would read what it does not have, or a
  token would be routed by what comes after it."""
  router = spec.get('router')
  if router is None:
    return
  if ROUTERS[router.name].reads_token_ids and 'head' in paths:
    raise ValueError(
      f'the router {router.name} reads the ids of tokens, which the head does '
      'not have; name other sites with `targets`, or take another router'
    )
  if ROUTERS[router.name].causal:
    return
  for path in paths:
    if path.split('/')[0] != 'encoder':
      raise ValueError(
        f'the router {router.name} reads later tokens, which at {path} are '
        "those to predict; name those of an encoder, targets='encoder/*', or "
        'take another router'
      )


def _check_two_pass(adapter: nn.Module, sites: Mapping[str, str]) -> None:
  """Raises ValueError where a model has no first pass for an adapter."""
  has_encoder = any(path.startswith('encoder/') for path in sites)
  if getattr(adapter, 'two_pass', False) and has_encoder:
    raise ValueError(
      f'{adapter.name} routes by a first pass of a decoder-only model, and '
      "this one has an encoder; take another model, or write reads='input'"
    )


def _placed(
  adapter, spec, method, sites, semantics
) -> list[tuple[str, nn.Module]]:
  """(site, adapter) of a spec, in the model's order.

  Of a mixture of several kinds of experts, each site has the kinds at it.
  """
  patterns = spec.get('targets')
  if not isinstance(method.expert, KindsMethod):
    paths = _paths(spec.name, patterns, method, sites, semantics)
    return [(path, adapter) for path in paths]
  if patterns is not None:
    paths = _paths(spec.name, patterns, method, sites, semantics)
    sites = {path: sites[path] for path in paths}
  kinds = [
    _paths(
      f'{spec.name}: {k.name}', k.targets or None, k.method, sites, semantics
    )
    for k in method.expert.kinds
  ]
  placed = []
  for path in sites:
    present = [i for i, paths in enumerate(kinds) if path in paths]
    if present and len(present) < len(kinds) and not adapter.share_routing:
      raise ValueError(
        f'{spec.name}: not all kinds of experts are at {path}, so a router of '
        'that site would give weight to others; give all the same `targets`, '
        'or write share_routing=True'
      )
    if present:
      placed.append((path, adapter.clone(expert=adapter.expert.only(present))))
  return placed


def _paths(name, patterns, method, sites, semantics) -> list[str]:
  """The sites that a method adapts, in the model's order."""
  if patterns is None:
    roles = method.roles[semantics]
    paths = [path for path, role in sites.items() if role in roles]
    if not paths:
      raise ValueError(f'{name} finds no site; name some with `targets`')
    return paths
  paths = set()
  for pattern in patterns.split('|'):
    matched = fnmatch.filter(sites, pattern.strip())
    if not matched:
      raise ValueError(
        f'{name}: the pattern {pattern!r} matches no site; the sites '
        f'are {", ".join(sites)}'
      )
    paths |= set(matched)
  return [path for path in sites if path in paths]


def unique_name(name: str, used_names: set[str], separator: str = '_') -> str:
  """A name that no other adapter has, added to `used_names`: lora, lora_2."""
  unique, i = name, 2
  while unique in used_names:
    unique, i = f'{name}{separator}{i}', i + 1
  used_names.add(unique)
  return unique
