# SPDX-License-Identifier: Apache-2.0
"""How Hugging Face's `peft` selects the modules of an adapter, by name."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

_NARROWING = ('exclude_modules', 'layers_to_transform', 'layers_pattern')


def describe(
  modules: Collection[str],
  adapted: Collection[str],
  inputs: Collection[str],
  like: Mapping[str, Any],
) -> dict[str, Any]:
  """The fields of adapter_config.json that select exactly some modules.

  Args:
    modules: all of the model's.
    adapted: those with an adapter; inputs: those whose input (IA)^3 scales.
    like: an earlier adapter_config.json, whose selection is kept if it is
      the same.
  """
  kept = {m for m in modules if selects(like, m)} == set(adapted)
  if kept:
    fields = {'target_modules': like['target_modules']}
  else:
    fields = {key: None for key in _NARROWING if like.get(key)}
    fields['target_modules'] = _names(adapted, modules, _below)
  if not inputs:
    return fields
  # peft compares these without the dot: 'o' would match wo, too.
  fields['feedforward_modules'] = _names(
    inputs, adapted, str.endswith, like.get('feedforward_modules')
  )
  if _disagree(fields['target_modules'], fields['feedforward_modules']):
    fields['target_modules'] = sorted(adapted)
    fields['feedforward_modules'] = sorted(inputs)
  return fields


def selects(config: Mapping[str, Any], module: str) -> bool:
  """Whether an adapter_config.json puts an adapter at a module.

  As `peft.tuners.tuners_utils.check_target_module_exists` decides it.
  """
  targets = config.get('target_modules')
  if not targets or _matches(config.get('exclude_modules'), module):
    return False
  if isinstance(targets, str) or module in targets:
    return _matches(targets, module)
  chosen = config.get('layers_to_transform')
  if chosen is None or chosen == []:
    return _matches(targets, module)
  layer = _layer(module, config.get('layers_pattern') or r'[^.]*')
  chosen = [chosen] if isinstance(chosen, int) else chosen
  return _matches(targets, module) and layer in chosen


def _layer(module: str, patterns: Any) -> int | None:
  """The first number in a module's name, after one of the patterns."""
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    match = re.match(rf'.*?\.{pattern}\.(\d+)\.', module)
    if match:
      return int(match[1])
  return None


def _matches(names: Any, module: str) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(_below(module, name) for name in names or ())


def _below(module: str, name: str) -> bool:
  return f'.{module}'.endswith(f'.{name}')


def _disagree(targets: Any, inputs: Any) -> bool:
  """Whether peft, which compares words, would miss an input in the targets."""
  if isinstance(targets, str) or isinstance(inputs, str):
    return False
  return not set(inputs) <= set(targets)


def _names(
  chosen: Collection[str],
  among: Collection[str],
  matches: Callable[[str, str], bool],
  given: Any = None,
) -> Any:
  """`given` where it selects `chosen`, else short names, else full ones."""
  if isinstance(given, str):
    if {m for m in among if re.fullmatch(given, m)} == set(chosen):
      return given
    given = None
  short = sorted({module.rpartition('.')[2] for module in chosen})
  for ends in (given or short, short):
    selected = {m for m in among if any(matches(m, end) for end in ends)}
    if selected == set(chosen):
      return ends
  return sorted(chosen)
