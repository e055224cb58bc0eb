# SPDX-License-Identifier: Apache-2.0
"""Texts of methods: their options checked, completed and written out.

'molora(experts=10) + ia3' is parsed into a spec for each adapter
(`config.method_string`). A spec is resolved when its names and options are
checked and it has the options that the semantics decides. It is flat when an
expert's options stand among those of its mixture, as a preset has them:
mixture(expert=lora, rank=4, experts=10).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.config.ranges import SEMANTICS
from moepeft.core.ranges import IntegerList, short_repr, suggestion
from moepeft.moe import ROUTERS, RouterSpec
from moepeft.peft.kinds import (
  KindsMethod,
  can_be_kind,
  kind_entry,
  kinds_of,
)
from moepeft.peft.method import Method, Option, options_of
from moepeft.peft.methods import METHODS
from moepeft.peft.mixture import EXPERT_COUNTS, can_be_expert, mixture_of


def resolve(
  method: str,
  semantics: str = 'official',
  methods: Mapping[str, Method] = METHODS,
) -> list[Spec]:
  """The flat, resolved specs of a method, the innermost adapter first.

  Args:
    semantics: decides what the text leaves open; official is the released
      code, paper the text.
    methods: the registry.

  Raises:
    ValueError: a name, option or semantics does not exist.
  """
  if semantics not in SEMANTICS:
    raise ValueError(
      f'semantics is one of {", ".join(SEMANTICS)}; got {semantics!r}'
    )
  return [
    _resolve(spec, methods, semantics)
    for spec in method_string.parse_method(method)
  ]


def canonical_text(
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
  for spec in resolve(method, semantics, methods):
    entry = method_entry(spec, methods)
    declared = entry.options()
    if 'experts' in declared and declared['experts_per_layer'].default:
      # Even the module's default number replaces a preset's counts by layer.
      del declared['experts']
    options = _unusual(spec, declared)
    router = options.pop('router', None)
    if router is not None:
      router = _canonical_router(router)
      default = _complete_router(method_string.parse(entry.router), semantics)
      if router != _canonical_router(default):
        options['router'] = router
    if isinstance(options.get('expert'), tuple):
      options['expert'] = tuple(
        _canonical_kind(kind, methods) for kind in options['expert']
      )
    specs.append(Spec(spec.name, tuple(sorted(options.items()))))
  return format_specs(specs, methods)


def _canonical_kind(kind: Spec, methods: Mapping[str, Method]) -> Spec:
  options = _unusual(kind, methods[kind.name].options())
  return Spec(kind.name, tuple(sorted(options.items())))


def _canonical_router(router: Spec) -> Spec:
  options = _unusual(router, options_of(ROUTERS[router.name].module))
  return Spec(router.name, tuple(sorted(options.items())))


def _complete_router(router: Spec, semantics: str) -> Spec:
  """The router with the options that the semantics decides."""
  decided = ROUTERS[router.name].defaults.get(semantics, {})
  return Spec(
    router.name,
    tuple(
      (
        dict(router.options)
        | {k: v for k, v in decided.items() if router.get(k) is None}
      ).items()
    ),
  )


def _unusual(spec: Spec, options: Mapping[str, Option]) -> dict[str, Any]:
  return {
    name: value
    for name, value in spec.options
    if name not in options or options[name].default != value
  }


def expanded_text(
  method: str,
  semantics: str = 'official',
  methods: Mapping[str, Method] = METHODS,
) -> str:
  """A method's text with each preset as its mixture, every option written.

  Raises:
    ValueError: as `build`.
  """
  specs = []
  for spec in resolve(method, semantics, methods):
    entry = method_entry(spec, methods)
    options = {k: o.default for k, o in entry.options().items()}
    options |= dict(spec.options)
    if entry.expert:
      if isinstance(entry.expert, KindsMethod):
        expert = entry.expert.specs(options)
        of_mixture = options_of(entry.module).keys() | {'targets'}
        options = {k: v for k, v in options.items() if k in of_mixture}
      else:
        expert = next(n for n, m in methods.items() if m is entry.expert)
      options.pop('expert', None)
      options = {'expert': expert} | options
      router = options['router']
      defaults = options_of(ROUTERS[router.name].module)
      del defaults['experts']
      usual = {k: option.default for k, option in defaults.items()}
      router = Spec(router.name, tuple((usual | dict(router.options)).items()))
      options['router'] = router
      # Exactly one of them may stand in a method string.
      count_names = dict(spec.options).keys() & EXPERT_COUNTS or {
        'experts_per_layer' if options['experts_per_layer'] else 'experts'
      }
      for name in {*EXPERT_COUNTS} - count_names:
        options.pop(name, None)
      if 'ranks' in count_names:
        del options['rank']
      if 'from_adapters' not in count_names:
        del options['train_experts']
    name = 'mixture' if entry.expert else spec.name
    specs.append(Spec(name, tuple(options.items())))
  return format_specs(specs, methods)


def portable_text(method: str) -> str:
  """A resolved method's text with `experts` in place of `from_adapters`.

  It builds the same function, and describes an adapter whose arrays hold the
  experts, wherever those files are.
  """
  specs = [flatten_expert(spec) for spec in method_string.parse_method(method)]
  if not any(spec.get('from_adapters') for spec in specs):
    return method
  portable_specs = []
  for spec in specs:
    options = dict(spec.options)
    # A name alone is parsed as text.
    if isinstance(options.get('router'), str):
      options['router'] = Spec(options['router'])
    options.pop('train_experts', None)
    portable_specs.append(
      Spec(
        spec.name,
        tuple(
          ('experts', len(value)) if name == 'from_adapters' else (name, value)
          for name, value in options.items()
        ),
      )
    )
  return format_specs(portable_specs, METHODS)


def method_entry(spec: Spec, methods: Mapping[str, Method] = METHODS) -> Method:
  """The entry of a flat spec; of a mixture, with the facts of its expert.

  Raises:
    ValueError: the method does not exist, or has no expert that exists.
  """
  method = _find(spec.name, methods, 'method')
  if 'expert' not in options_of(method.module) or method.expert:
    return method
  expert = spec.get('expert')
  if isinstance(expert, tuple) and len(expert) > 1:
    return _mixture_of_kinds(spec.name, expert, methods)
  if expert is None and spec.get('from_adapters'):
    raise ValueError(
      f'{spec.name} has its expert in the files of from_adapters, which are '
      "read for config.method alone; write `expert` and `targets` as the run's "
      'first line has them'
    )
  if not isinstance(expert, str) or not expert:
    raise ValueError(
      f'{spec.name} has an expert like lora or lora(rank=4); got '
      f'{short_repr(expert)}'
    )
  expert_method = _find(expert, methods, 'method')
  if not can_be_expert(expert_method):
    names = [name for name, m in methods.items() if can_be_expert(m)]
    raise ValueError(
      f'{spec.name}: {expert} cannot be an expert; {", ".join(names)} can'
    )
  return mixture_of(expert_method)


def _mixture_of_kinds(name: str, experts: Sequence[Spec], methods) -> Method:
  """The entry of a mixture whose option `expert` is a list."""
  kinds = []
  for spec in experts:
    if not isinstance(spec, Spec):
      raise ValueError(
        f"{name} has experts like lora or lora(rank=4, targets='*/q'); got "
        f'{short_repr(spec)}'
      )
    method = _find(spec.name, methods, 'method')
    if not can_be_kind(method):
      names = [n for n, m in methods.items() if can_be_kind(m)]
      raise ValueError(
        f'{name}: {spec.name} cannot be one of several kinds of experts; '
        f'{", ".join(names)} can'
      )
    options = dict(spec.options)
    targets = options.pop('targets', '')
    kinds.append(kind_entry(spec.name, method, targets, **options))
  return mixture_of(kinds_of(kinds), values={'share_routing': True})


def flatten_expert(spec: Spec) -> Spec:
  """mixture(expert=lora(rank=4), experts=10) as one list of options.

  mixture(expert=lora, rank=4, experts=10): as a preset has them. Several kinds
  of experts keep theirs.

  Raises:
    ValueError: an option of the expert is one of the mixture too.
  """
  expert = spec.get('expert')
  if isinstance(expert, tuple) and len(expert) != 1:
    kinds = (Spec(kind) if isinstance(kind, str) else kind for kind in expert)
    return spec.replace(expert=tuple(kinds))
  if isinstance(expert, tuple):
    (expert,) = expert
    spec = spec.replace(expert=expert)
  if not isinstance(expert, Spec):
    return spec
  twice = dict(spec.options).keys() & dict(expert.options).keys()
  if twice:
    raise ValueError(
      f'{spec.name} and its expert both have {", ".join(sorted(twice))}; '
      'give it once'
    )
  options = []
  for option, value in spec.options:
    options += (
      [(option, expert.name), *expert.options]
      if option == 'expert'
      else [(option, value)]
    )
  return Spec(spec.name, tuple(options))


def nest_expert(spec: Spec, methods: Mapping[str, Method] = METHODS) -> Spec:
  """The inverse of `flatten_expert`: an expert has its own options."""
  expert = spec.get('expert')
  if not isinstance(expert, str):
    return spec
  names = methods[expert].options()
  inner = tuple((k, v) for k, v in spec.options if k in names)
  return Spec(
    spec.name,
    tuple(
      (k, Spec(expert, inner) if k == 'expert' else v)
      for k, v in spec.options
      if k not in names
    ),
  )


def _resolve(spec: Spec, methods, semantics: str) -> Spec:
  """Checks names and options and adds what the semantics decides; flat."""
  spec = flatten_expert(spec)
  method = method_entry(spec, methods)
  user_options = dict(spec.options)
  decided = dict(method.defaults.get(semantics, {}))
  options, router_entry = method.options(), None
  if 'router' in options:
    router = user_options.get('router', method_string.parse(method.router))
    router = Spec(router) if isinstance(router, str) else router
    if not isinstance(router, Spec):
      raise ValueError(
        f'{spec.name}: a router is written like softmax or topk(k=2); got '
        f'{router!r}'
      )
    router_entry = _find(router.name, ROUTERS, 'router')
    router_options = options_of(router_entry.module)
    router_options.pop('experts')
    _check(router, router_options)
    router = _complete_router(router, semantics)
    decided['router'] = user_options['router'] = router
  extra = {'targets': Option('')} if method.module else {}
  if method.expert and method is not methods[spec.name]:
    kinds = spec.get('expert')
    kinds = kinds if isinstance(kinds, tuple) else ()
    extra['expert'] = Option(() if kinds else '')
    for kind in kinds:
      _check(kind, methods[kind.name].options() | {'targets': Option('')})
  _check(spec, options | extra)
  _check_combination(spec, method)
  if router_entry:
    _check_columns(spec, method, router_entry)
  return Spec(
    spec.name, tuple((user_options | (decided | user_options)).items())
  )


def option_values(spec: Spec, method: Method) -> dict[str, Any]:
  """{option: value} of a flat spec, with the defaults of those not given."""
  values = {name: option.default for name, option in method.options().items()}
  options = dict(spec.options)
  if 'experts_per_layer' in values and options.keys() & EXPERT_COUNTS:
    # A count in the text replaces a preset's counts by layer.
    values['experts_per_layer'] = ()
  return values | options


def _check_combination(spec: Spec, method: Method) -> None:
  """Raises a ValueError for options that cannot stand together."""
  options, values = dict(spec.options), option_values(spec, method)
  counts = [name for name in EXPERT_COUNTS if name in options]
  if len(counts) > 1:
    raise ValueError(
      f'{spec.name} takes one of {" and ".join(counts)}; drop the others'
    )
  unused = method.module_defaults
  errors = [exclusion.error(values, unused) for exclusion in method.exclusions]
  if (values.get('reads') == 'embedding') != bool(values.get('embedding_size')):
    errors.append(
      "reads='embedding' stands beside the number of values of an embedding, "
      'like embedding_size=384; give both or none'
    )
  if {'rank', 'ranks'} <= options.keys():
    errors.append('ranks has the rank of each expert; drop rank')
  if 'train_experts' in options and 'from_adapters' not in options:
    errors.append(
      'train_experts is for experts that are given by from_adapters; drop it, '
      'since others are trained'
    )
  try:
    if method.check:
      method.check(values)
  except ValueError as error:
    errors.append(str(error))
  errors = [error for error in errors if error]
  if errors:
    raise ValueError(f'{spec.name}: {errors[0]}')


def _check_columns(spec: Spec, method: Method, router: RouterSpec) -> None:
  """Raises a ValueError where a router cannot be one of many at a site."""
  has_fixed_arrays = (
    router.update or router.from_experts or router.pooled_module
  )
  if has_fixed_arrays and option_values(spec, method).get('by_column'):
    raise ValueError(
      f'{spec.name}: by_column needs a router without state or a fixed '
      'projection, such as softmax or topk; change it, or drop by_column'
    )


def _check(spec: Spec, options: Mapping[str, Option]) -> None:
  """Raises a ValueError for an option that is not there or cannot be."""
  unknown = sorted(set(dict(spec.options)) - set(options))
  if 'sites' in unknown:
    raise ValueError(
      f'{spec.name}: the option sites is now targets; write that'
    )
  if 'budget' in unknown:
    raise ValueError(
      f'{spec.name}: budget is an option of config.method alone, which train '
      'and count solve; write the method that python -m moepeft.count prints'
    )
  if unknown:
    near = suggestion(unknown[0], options)
    listed = near or f'; it has {", ".join(sorted(options)) or "none"}'
    raise ValueError(f'{spec.name} has no option {", ".join(unknown)}{listed}')
  for name, value in spec.options:
    option = options[name]
    if isinstance(option.default, nn.Module):
      continue
    expected = type(option.default)
    accepted = (int, float) if expected is float else expected
    if isinstance(option.allowed, IntegerList) and option.allowed.names:
      expected, accepted = tuple, (tuple, str)
    if not isinstance(value, accepted) or (
      isinstance(value, bool) and expected is not bool
    ):
      kind = 'list' if expected is tuple else expected.__name__
      raise ValueError(
        f"{spec.name}'s option {name} is of type {kind}; got "
        f'{short_repr(value)}'
      )
    if option.allowed is not None:
      option.allowed.check(f"{spec.name}'s option {name}", value)


def _find(name: str, registry, kind: str):
  if name not in registry:
    near = suggestion(name, registry)
    listed = near or f'; there are {", ".join(registry)}'
    raise ValueError(f'there is no {kind} {short_repr(name)}{listed}')
  return registry[name]


def format_specs(specs, methods: Mapping[str, Method]) -> str:
  return method_string.format_method(
    tuple(nest_expert(s, methods) for s in specs)
  )
