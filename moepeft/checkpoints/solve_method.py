# SPDX-License-Identifier: Apache-2.0
"""Solves a config's budget for a rank or a number of experts, and its scale.

`with_explicit_method` is called before anything is built. What it returns has
the explicit method, so that a run, its checkpoints and its exports have it, and
nothing is solved again. Counts are those of `python -m moepeft.count`.
"""

import math
from collections.abc import Callable

from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.budget_search import Axis, search
from moepeft.checkpoints.count_flops import flops_per_token
from moepeft.checkpoints.count_parameters import count
from moepeft.config import budget as budget_lib
from moepeft.config import method_string
from moepeft.config.budget import UNITS
from moepeft.config.method_string import Spec
from moepeft.core.ranges import short_repr
from moepeft.peft.method_text import (
  flatten_expert,
  format_specs,
  method_entry,
  option_values,
  resolve,
)
from moepeft.peft.methods import METHODS

# The option that is solved, where config.budget_option names none: the first
# that the adapter has.
_OPTIONS = ('rank', 'size', 'length', 'experts')


def with_explicit_method(config: ConfigDict) -> ConfigDict:
  """The config with an explicit method; unchanged if it asks for nothing.

  Raises:
    ValueError: the request has another syntax, the method has no such option,
      or no value of it is within config.budget_tolerance of the budget.
  """
  if not (budget_lib.request(config) or config.budget_option):
    return config
  specs, requests = zip(
    *map(budget_lib.without_request, method_string.parse_method(config.method)),
    strict=True,
  )
  specs = [_flat(spec) for spec in specs]
  # Checks names and options.
  resolve(format_specs(specs, METHODS), config.semantics)
  budget, index = _budget(config, specs, [r['budget'] for r in requests])
  options = [request['budget_option'] for request in requests]
  option = options.pop(index) if budget else ''
  idle = options if budget else [*options, config.budget_option]
  if any(idle):
    raise ValueError(
      f'budget_option={max(idle)!r} does nothing without a budget beside it; '
      'set both, or none'
    )
  if budget:
    option = option or config.budget_option
    specs[index] = _solve(config, specs, index, budget, option)
  specs = _match_scales(config, specs, [r['scale'] for r in requests])
  return budget_lib.solved(config, format_specs(specs, METHODS))


def _flat(spec: Spec) -> Spec:
  """The flat spec; the name of a router alone is parsed as text."""
  spec = flatten_expert(spec)
  router = spec.get('router')
  return spec.replace(router=Spec(router)) if isinstance(router, str) else spec


def _budget(config, specs, budgets) -> tuple[str, int]:
  """(budget, position of the adapter that is solved); '' for no budget.

  Raises:
    ValueError: several adapters have a budget, or none of several.
  """
  with_budget = [i for i, budget in enumerate(budgets) if budget]
  if len(with_budget) + bool(config.budget) > 1:
    raise ValueError(
      'a method has one budget, of all its adapters; give config.budget, or '
      'the option `budget` of the one adapter that is solved'
    )
  if with_budget:
    return budgets[with_budget[0]], with_budget[0]
  mixtures = [i for i, spec in enumerate(specs) if _has_experts(spec)]
  candidates = mixtures if len(specs) > 1 else [0]
  if config.budget and len(candidates) != 1:
    raise ValueError(
      f'config.budget={config.budget!r} does not say which adapter of '
      f'{config.method!r} is solved; give it as the option `budget` of that one'
    )
  return config.budget, (candidates or [0])[0]


def _has_experts(spec: Spec) -> bool:
  return 'experts' in method_entry(spec).options()


def _solve(
  config: ConfigDict, specs: list[Spec], index: int, text: str, option: str
) -> Spec:
  """The spec with the values of its options that meet the budget."""
  budget, spec = budget_lib.parse_budget(text), specs[index]
  names = _option_names(spec, option)
  entry = method_entry(spec)
  values = option_values(spec, entry)
  shape = base_lib.shape(config.model)
  measure = _measures(config, shape)[budget.unit]

  def number(*values: int) -> float:
    changed = [*specs]
    changed[index] = spec.replace(**dict(zip(names, values, strict=True)))
    return measure(format_specs(changed, METHODS))

  target = budget.amount or measure(_baseline(budget.method, text))
  if budget.percent:
    target *= budget.percent / 100
  axes = []
  for name in names:
    allowed, start = entry.options()[name].allowed, values[name]
    # A pair is that of a mixture, which one expert is not.
    fewest = min(start, 2) if name == 'experts' and len(names) > 1 else 1
    axes.append(Axis(start, max(int(allowed.low), fewest), int(allowed.high)))
  tolerance = config.budget_tolerance * target
  numbers, reason = search(number, target, tolerance, axes)
  best = min(numbers, key=lambda values: abs(numbers[values] - target))
  if abs(numbers[best] - target) > tolerance:
    nearest = ' and '.join(
      ', '.join(f'{name}={v}' for name, v in zip(names, values, strict=True))
      + f' gives {n:,.0f}'
      for values, n in numbers.items()
    )
    raise ValueError(
      f'no {" with any ".join(names)} of {spec.name} gives {target:,.0f} '
      f'{UNITS[budget.unit]} within {100 * config.budget_tolerance:g} %: '
      f'{nearest}{reason}; ask for one of these, solve for another '
      'config.budget_option, or allow the nearest with a larger '
      'config.budget_tolerance'
    )
  return spec.replace(**dict(zip(names, best, strict=True)))


def _baseline(method: str, text: str) -> str | None:
  """The method of a budget; None for the base.

  Raises:
    ValueError: there is no such method.
  """
  try:
    return resolve(method) and method if method else None
  except ValueError as error:
    raise ValueError(
      f'budget={text!r} is neither a number, a percent nor a method: {error}'
    ) from None


def _measures(config: ConfigDict, shape) -> dict[str, Callable]:
  """{unit of a budget: method or None for the base -> number}."""

  def with_method(text: str) -> ConfigDict:
    trial = config.copy_and_resolve_references()
    trial.method, trial.budget, trial.scale = text, '', ''
    return trial

  def parameters(method: str | None) -> int:
    return count(with_method(method or 'full'), shape)['peft']

  def flops(method: str | None) -> float:
    passes = flops_per_token(with_method(method or 'full'), shape)
    if passes is None:
      raise ValueError(
        'the FLOPs of a token are those of a decoder; give a budget of params'
      )
    return sum(passes.values())

  return {'params': parameters, 'flops': flops}


def _option_names(spec: Spec, text: str) -> list[str]:
  """The options that are solved: one, or a pair 'rank,experts'.

  Raises:
    ValueError: as `_option_name`, or they are no pair.
  """
  names = [part.strip() for part in text.split(',')]
  if len({*names}) != len(names) or len(names) > 2 or '' in names[1:]:
    raise ValueError(
      'budget_option is an option like rank, or two with a comma, '
      f'rank,experts; got {short_repr(text)}'
    )
  return [_option_name(spec, name) for name in names]


def _option_name(spec: Spec, name: str) -> str:
  """An option that is solved; '' for the first that the adapter has.

  Raises:
    ValueError: the adapter has none, or its value is determined otherwise.
  """
  entry = method_entry(spec)
  options = entry.options()
  numbers = [n for n, o in options.items() if type(o.default) is int]
  name = name or next((n for n in _OPTIONS if n in numbers), '')
  if name not in numbers:
    listed = ', '.join(n for n in _OPTIONS if n in numbers)
    raise ValueError(
      f'{spec.name} has no option {name or "like rank or experts"} to solve a '
      f'budget for'
      + (f'; set config.budget_option to one of {listed}' if listed else '')
    )
  values = option_values(spec, entry)
  determining = {'rank': ('ranks',), 'experts': ('ranks', 'experts_per_layer')}
  for option in ('from_adapters', *determining.get(name, ())):
    if values.get(option):
      raise ValueError(
        f'{spec.name} has {option}={short_repr(values[option])}, so that a '
        f'budget cannot be solved for {name}; solve for another '
        f'config.budget_option, or write {name} in place of {option}'
      )
  return name


def _match_scales(config, specs, scales) -> list[Spec]:
  """The specs with the alpha of the scales that they ask for.

  Raises:
    ValueError: a scale is given twice, or for adapters that have none.
  """
  if config.scale and any(scales):
    raise ValueError(
      'the scale is given twice; give config.scale, for all adapters, or the '
      'option `scale` of one'
    )
  texts = [scale or config.scale for scale in scales]
  matched = [
    _matched(spec, _scale_of(budget_lib.parse_scale(text))) if text else spec
    for spec, text in zip(specs, texts, strict=True)
  ]
  unscaled = [
    spec.name
    for spec, new, scale in zip(specs, matched, scales, strict=True)
    if scale and new is None
  ]
  if config.scale and not any(matched):
    unscaled = [spec.name for spec in specs]
  if unscaled:
    raise ValueError(
      f'{unscaled[0]} has no alpha and rank, so that its scale cannot be '
      'matched; leave `scale` out'
    )
  return [new or spec for spec, new in zip(specs, matched, strict=True)]


def _matched(spec: Spec, scale: float) -> Spec | None:
  """The spec with alpha / r, or alpha / sqrt(r), equal to a scale.

  None if it has no alpha.

  Raises:
    ValueError: its experts have scales of their own.
  """
  if isinstance(spec.get('expert'), tuple):
    kinds = [_matched(kind, scale) for kind in spec.get('expert')]
    if not any(kinds):
      return None
    pairs = zip(kinds, spec.get('expert'), strict=True)
    return spec.replace(expert=tuple(new or kind for new, kind in pairs))
  entry = method_entry(spec)
  values = option_values(spec, entry)
  if not {'alpha', 'rank'} <= values.keys():
    return None
  for name in ('ranks', 'from_adapters'):
    if values.get(name):
      raise ValueError(
        f'{spec.name} has {name}, whose experts have scales of their own; '
        f'leave `scale` out, or write rank in place of {name}'
      )
  return spec.replace(alpha=scale * _rank_divisor(values))


def _rank_divisor(values) -> float:
  return math.sqrt(values['rank']) if values.get('rslora') else values['rank']


def _scale_of(baseline: str) -> float:
  """alpha / r of a method, or alpha / sqrt(r).

  Raises:
    ValueError: it has none.
  """
  spec, *outer = resolve(baseline)
  values = option_values(spec, method_entry(spec))
  if outer or not {'alpha', 'rank'} <= values.keys() or values.get('ranks'):
    raise ValueError(
      f'the baseline of a scale is one adapter with alpha and rank, like '
      f'{budget_lib.BASELINE}; got {baseline!r}'
    )
  return values['alpha'] / _rank_divisor(values)
