# SPDX-License-Identifier: Apache-2.0
"""How Hugging Face's `peft` selects the modules of an adapter, by name."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any


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
  given = like.get('target_modules')
  chosen = _names(adapted, modules, _below, given)
  fields = {'target_modules': chosen}
  if chosen != given:
    narrowing = ('exclude_modules', 'layers_to_transform', 'layers_pattern')
    fields |= {key: None for key in narrowing if like.get(key)}
  if inputs:
    given = like.get('feedforward_modules')
    # peft compares these without the dot: 'o' would match wo, too.
    fields['feedforward_modules'] = _names(
      inputs, adapted, str.endswith, given
    )
  return fields


def _below(module: str, name: str) -> bool:
  return f'.{module}'.endswith(f'.{name}')


def _names(
  chosen: Collection[str],
  among: Collection[str],
  matches: Callable[[str, str], bool],
  given: Any,
) -> Any:
  """`given` where it selects `chosen`, else short names, else full ones."""
  short = sorted({module.rpartition('.')[2] for module in chosen})
  for names in (given, short):
    if isinstance(names, str):
      selected = {m for m in among if re.fullmatch(names, m)}
    else:
      ends = names or ()
      selected = {m for m in among if any(matches(m, end) for end in ends)}
    if names is not None and selected == set(chosen):
      return names
  return sorted(chosen)
