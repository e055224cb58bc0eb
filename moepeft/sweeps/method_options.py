# SPDX-License-Identifier: Apache-2.0
"""Sets options of a method's text: keys of a grid such as experts or rank.

'experts' is an option of every adapter of the method that has it;
'molora.experts' is the option of the adapters of that name alone, and says
nothing of methods without them.
"""

from moepeft.config import method_string
from moepeft.core.ranges import short_repr, suggestion
from moepeft.peft.method_text import (
  flatten_expert,
  format_specs,
  method_entry,
)
from moepeft.peft.methods import METHODS


def names(method: str) -> set[str]:
  """The names of a method's adapters: {'molora', 'ia3'} of 'molora + ia3'."""
  return {spec.name for spec in method_string.parse_method(method)}


def options(method: str) -> set[str]:
  """The options of a method's adapters, and of their experts.

  Raises:
    ValueError: a method does not exist.
  """
  specs = map(flatten_expert, method_string.parse_method(method))
  return {name for spec in specs for name in _options(spec)}


def with_option(method: str, key: str, value: int | float | str) -> str:
  """A method's text with an option set.

  Args:
    key: 'experts', or 'molora.experts' for the adapters of that name.
    value: a text is parsed as in a method: softmax, topk(k=2), [2, 4].

  Raises:
    ValueError: no adapter has the option.
  """
  adapter, _, option = key.rpartition('.')
  specs, has_option = [], False
  for spec in map(flatten_expert, method_string.parse_method(method)):
    if adapter in ('', spec.name) and option in _options(spec):
      spec, has_option = spec.replace(**{option: _parsed(value)}), True
    specs.append(spec)
  if not has_option:
    advice = suggestion(option, options(method))
    if not adapter and not advice:
      advice = f'; write NAME.{option} for the methods of one name alone'
    raise ValueError(
      f'--grid has {key}, and the method {short_repr(method)} has no option '
      f'{option}{advice}'
    )
  return format_specs(specs, METHODS)


def _parsed(value: int | float | str) -> method_string.Value:
  if not isinstance(value, str):
    return value
  try:
    return method_string.parse(f'method(option={value})').get('option')
  except ValueError:
    # A text without its quotes, like the pattern */self/q of `targets`.
    return value


def _options(spec: method_string.Spec) -> set[str]:
  entry = method_entry(spec)
  return set(entry.options()) | ({'targets'} if entry.module else set())
