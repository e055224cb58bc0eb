# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json of Hugging Face's `peft`: its checks and selections."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from moepeft.checkpoints import directory
from moepeft.checkpoints.hf import peft_prompt
from moepeft.core import untrusted
from moepeft.models.weight_mapping import CheckpointError

FILE = 'adapter_config.json'
_TYPES = ('LORA', 'IA3', peft_prompt.KIND)
# Fields that are read, or do not change what a trained adapter computes; a
# field that is not here must be empty.
_HARMLESS = frozenset(
  """
  auto_mapping base_model_name_or_path corda_config ensure_weight_tying
  eva_config exclude_modules fan_in_fan_out feedforward_modules inference_mode
  alpha_pattern init_ia3_weights layers_pattern layers_to_transform lora_alpha
  lora_dropout megatron_core peft_type peft_version qalora_group_size r
  rank_pattern
  revision runtime_config target_modules task_type use_dora use_rslora
  """.split()
)
# Of prompt tuning: besides, how the vectors began.
_OF_PROMPTS = frozenset(
  """
  num_virtual_tokens token_dim num_transformer_submodules num_attention_heads
  num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs
  tokenizer_name_or_path
  """.split()
)
# Other initialisations change the base's weights along with the adapter.
_NEUTRAL = {
  'bias': ('none',),
  'init_lora_weights': (True, 'gaussian', 'orthogonal', 'eva', 'mica'),
}
_NARROWING = ('exclude_modules', 'layers_to_transform', 'layers_pattern')


def read(path: str) -> dict[str, Any]:
  """An adapter's file, which `moepeft.checkpoints.hf.peft` understands whole.

  Raises:
    CheckpointError: it is absent or damaged, or says something else.
  """
  fields = directory.read_json(Path(path) / FILE)
  kind = fields.get('peft_type')
  if not isinstance(kind, str) or kind not in _TYPES:
    raise CheckpointError(
      f'{path} is a peft adapter of the type {kind!r}; LORA, IA3 and '
      f'{peft_prompt.KIND} are supported'
    )
  try:
    _check(fields)
  except ValueError as error:
    raise CheckpointError(
      f'{path}/{FILE} is damaged or not of this adapter: {error}; save the '
      'adapter again with peft'
    ) from None
  trained = fields.get('modules_to_save')
  if trained:
    raise CheckpointError(
      f'{path} trained the modules {trained} whole beside the adapter '
      '(modules_to_save), which is not supported: merge both into the base '
      'with peft (merge_and_unload) and use the merged model'
    )
  harmless = _HARMLESS | (_OF_PROMPTS if kind == peft_prompt.KIND else set())
  for name, value in sorted(fields.items()):
    neutral = _NEUTRAL.get(name, ())
    plain = not value or any(
      value == neutral_value for neutral_value in neutral
    )
    if name not in harmless and not plain:
      raise CheckpointError(
        f'{path}/{FILE} sets {name}={value!r}, which is not supported: '
        'merge the adapter into its base with peft (merge_and_unload) and '
        'convert the merged model'
      )
  return fields


# Fields by their type; ranks and lengths are at least 1.
_KINDS: dict[str, type] = {
  **dict.fromkeys(('r', 'num_virtual_tokens', 'token_dim'), int),
  **dict.fromkeys(('num_transformer_submodules',), int),
  **dict.fromkeys(('lora_alpha', 'lora_dropout'), float),
  **dict.fromkeys(('use_dora', 'use_rslora', 'fan_in_fan_out'), bool),
  **dict.fromkeys(('rank_pattern', 'alpha_pattern'), dict),
  'base_model_name_or_path': str,
}
_MOST = 2**31 - 1


def _check(fields: Mapping[str, Any]) -> None:
  """
  Raises:
    ValueError: a field is of another type or out of range.
  """
  for name, kind in _KINDS.items():
    value = untrusted.field(fields, name, kind, None)
    if value is not None and kind is int and not 1 <= value <= _MOST:
      raise ValueError(f'expected 1 to {_MOST:,} in {name!r}, got {value}')
    if value is not None and kind is float and not 0 <= value <= _MOST:
      raise ValueError(f'expected 0 to {_MOST:,} in {name!r}, got {value}')
  if fields['peft_type'] == 'LORA':
    untrusted.field(fields, 'r', int)
    untrusted.field(fields, 'lora_alpha', float)
  if (fields.get('lora_dropout') or 0) > 0.99:
    raise ValueError(
      f"expected at most 0.99 in 'lora_dropout', got {fields['lora_dropout']}"
    )
  for name in ('rank_pattern', 'alpha_pattern'):
    for pattern, value in (fields.get(name) or {}).items():
      _compiled(pattern)
      whole = name == 'rank_pattern'
      kinds = int if whole else (int, float)
      if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f'expected numbers in {name!r}, got {value!r:.60}')
      if not int(whole) <= value <= _MOST:
        raise ValueError(f'expected other numbers in {name!r}, got {value}')


def pattern_value(
  fields: Mapping[str, Any], name: str, module: str, usual: Any
) -> Any:
  """A module's value in `rank_pattern` or `alpha_pattern`.

  As `peft.utils.get_pattern_key` decides it: the first key that is the end of
  the module's name, as a regular expression.
  """
  for pattern, value in (fields.get(name) or {}).items():
    if _compiled(pattern).match(module):
      return value
  return usual


@functools.lru_cache
def _compiled(pattern: str) -> re.Pattern:
  """
  Raises:
    ValueError: it is no regular expression, or one that could take for ever.
  """
  repeats = len(re.findall(r'[*+{]', pattern))
  if len(pattern) > 500 or repeats > 3 or re.search(r'\)[*+{]', pattern):
    raise ValueError(
      f'expected a plain pattern of module names, got {pattern!r:.60}'
    )
  try:
    return re.compile(rf'(.*\.)?({pattern})$')
  except (re.error, OverflowError) as error:
    raise ValueError(
      f'expected a regular expression, got {pattern!r:.60} ({error})'
    ) from None


def selection(
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
  is_unchanged = {m for m in modules if selects(like, m)} == set(adapted)
  if is_unchanged:
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
  earlier: Any = None,
) -> Any:
  """`earlier` where it selects `chosen`, else short names, else full ones."""
  if isinstance(earlier, str):
    if {m for m in among if re.fullmatch(earlier, m)} == set(chosen):
      return earlier
    earlier = None
  short = sorted({module.rpartition('.')[2] for module in chosen})
  for ends in (earlier or short, short):
    selected = {m for m in among if any(matches(m, end) for end in ends)}
    if selected == set(chosen):
      return ends
  return sorted(chosen)
