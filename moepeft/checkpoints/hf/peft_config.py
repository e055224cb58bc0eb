# SPDX-License-Identifier: Apache-2.0
"""Checks adapter_config.json of `peft`, and selects modules as peft does."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from moepeft.checkpoints import directory
from moepeft.checkpoints.hf import peft_prefix, peft_prompt
from moepeft.core import untrusted
from moepeft.core.ranges import MAX_SEED
from moepeft.models.weight_mapping import CheckpointError

FILE = 'adapter_config.json'
_PROMPT_TYPES = (*peft_prompt.PEFT_TYPES, peft_prefix.PEFT_TYPE)
# Read as LoRA, see `peft_low_rank`.
LOW_RANK_TYPES = ('VERA', 'ADALORA', 'LOHA', 'LOKR')
_POLY = 'POLY'
_TYPES = ('LORA', 'IA3', 'LN_TUNING', *LOW_RANK_TYPES, *_PROMPT_TYPES, _POLY)
# Fields that are read, or do not change the function of a trained adapter.
# Other fields must be empty.
_ACCEPTED_FIELDS = frozenset(
  """
  auto_mapping base_model_name_or_path corda_config ensure_weight_tying
  eva_config exclude_modules fan_in_fan_out feedforward_modules inference_mode
  alpha_pattern init_ia3_weights layers_pattern layers_to_transform lora_alpha
  lora_dropout megatron_core peft_type peft_version qalora_group_size r
  rank_pattern
  revision runtime_config target_modules task_type use_dora use_rslora
  """.split()
)
# Further fields of prompts and prefixes. An encoder's are of training alone.
_PROMPT_FIELDS = frozenset(
  """
  num_virtual_tokens token_dim num_transformer_submodules num_attention_heads
  num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs
  tokenizer_name_or_path encoder_dropout encoder_hidden_size encoder_num_layers
  encoder_reparameterization_type init_weights prefix_projection
  """.split()
)
_LOW_RANK_FIELDS = frozenset(
  """
  alpha beta1 beta2 decompose_both decompose_factor deltaT d_initial init_r
  init_weights module_dropout orth_reg_weight projection_prng_key rank_dropout
  rank_dropout_scale save_projection target_r tfinal tinit total_step
  use_effective_conv2d vera_dropout
  """.split()
)
# Further fields of Poly, which are positive, and required.
_POLY_SIZES = ('r', 'n_tasks', 'n_skills', 'n_splits')
_POLY_FIELDS = frozenset((*_POLY_SIZES, 'poly_type', 'init_weights'))
# Other initializations also change the base's weights.
_ACCEPTED_VALUES = {
  'bias': ('none',),
  'init_lora_weights': (True, 'gaussian', 'orthogonal', 'eva', 'mica'),
}
# peft 0.21 saves an X-LoRA with changed names, and does not read it back.
_ADVICE = {
  'XLORA': ". Its experts are: train xlora(from_adapters=['a', 'b']) with them"
}
_SELECTION_FIELDS = ('exclude_modules', 'layers_to_transform', 'layers_pattern')


def read(path: str) -> dict[str, Any]:
  """Reads and checks the adapter_config.json of an adapter.

  Raises:
    CheckpointError: the file is missing or damaged, or a field is unsupported.
  """
  fields = directory.read_json(Path(path) / FILE)
  kind = fields.get('peft_type')
  if not isinstance(kind, str) or kind not in _TYPES:
    raise CheckpointError(
      f'{path} is a peft adapter of the type {kind!r}; '
      f'{", ".join(_TYPES)} are supported{_ADVICE.get(str(kind), "")}'
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
      f'{path} has fully trained modules {trained} (modules_to_save), which is '
      'not supported: merge them and the adapter into the base '
      'with peft (merge_and_unload) and use the merged model'
    )
  accepted_fields = _ACCEPTED_FIELDS
  for types, further_fields in (
    (_PROMPT_TYPES, _PROMPT_FIELDS),
    (LOW_RANK_TYPES, _LOW_RANK_FIELDS),
    ((_POLY,), _POLY_FIELDS),
  ):
    accepted_fields |= further_fields if kind in types else set()
  for name, value in sorted(fields.items()):
    neutral = _ACCEPTED_VALUES.get(name, ())
    is_neutral = not value or value in neutral
    if name not in accepted_fields and not is_neutral:
      raise CheckpointError(
        f'{path}/{FILE} sets {name}={value!r}, which is not supported: '
        'merge the adapter into its base with peft (merge_and_unload) and '
        'convert the merged model'
      )
  return fields


# Fields by their type; ranks and lengths are at least 1.
_FIELD_TYPES: dict[str, type] = {
  **dict.fromkeys(('r', 'init_r', 'num_virtual_tokens', 'token_dim'), int),
  **dict.fromkeys(('num_transformer_submodules',), int),
  **dict.fromkeys(('alpha', 'lora_alpha', 'lora_dropout'), float),
  **dict.fromkeys(('n_tasks', 'n_skills', 'n_splits'), int),
  **dict.fromkeys(('use_dora', 'use_rslora', 'fan_in_fan_out'), bool),
  **dict.fromkeys(('rank_pattern', 'alpha_pattern'), dict),
  'base_model_name_or_path': str,
}
_MAX_VALUE = 2**31 - 1


def _check(fields: Mapping[str, Any]) -> None:
  """
  Raises:
    ValueError: a field has a wrong type or is out of range.
  """
  for name, kind in _FIELD_TYPES.items():
    value = untrusted.field(fields, name, kind, None)
    if value is not None and kind is int and not 1 <= value <= _MAX_VALUE:
      raise ValueError(f'expected 1 to {_MAX_VALUE:,} in {name!r}, got {value}')
    if value is not None and kind is float and not 0 <= value <= _MAX_VALUE:
      raise ValueError(f'expected 0 to {_MAX_VALUE:,} in {name!r}, got {value}')
  if fields['peft_type'] == _POLY:
    for name in _POLY_SIZES:
      untrusted.field(fields, name, int)
  if fields['peft_type'] == 'LORA':
    untrusted.field(fields, 'r', int)
    untrusted.field(fields, 'lora_alpha', float)
  if fields['peft_type'] in LOW_RANK_TYPES:
    untrusted.field(fields, 'r', int)
    seed = untrusted.field(fields, 'projection_prng_key', int, 0)
    if not 0 <= seed <= MAX_SEED:
      raise ValueError(f'expected another projection_prng_key, got {seed}')
    if fields['peft_type'] == 'ADALORA':
      untrusted.field(fields, 'init_r', int)
      untrusted.field(fields, 'lora_alpha', float)
    elif fields['peft_type'] != 'VERA':
      untrusted.field(fields, 'alpha', float)
  if (fields.get('lora_dropout') or 0) > 0.99:
    raise ValueError(
      f"expected at most 0.99 in 'lora_dropout', got {fields['lora_dropout']}"
    )
  for name in ('rank_pattern', 'alpha_pattern'):
    if fields['peft_type'] == 'ADALORA':
      # Its patterns list the directions that are left, as its arrays show.
      continue
    for pattern, value in (fields.get(name) or {}).items():
      _compile_pattern(pattern)
      is_rank = name == 'rank_pattern'
      types = int if is_rank else (int, float)
      if isinstance(value, bool) or not isinstance(value, types):
        raise ValueError(f'expected numbers in {name!r}, got {value!r:.60}')
      if not int(is_rank) <= value <= _MAX_VALUE:
        raise ValueError(f'expected other numbers in {name!r}, got {value}')


def pattern_value(
  fields: Mapping[str, Any], name: str, module: str, default: Any
) -> Any:
  """A module's value in `rank_pattern` or `alpha_pattern`.

  As in `peft.utils.get_pattern_key`, the first key applies that, as a regular
  expression, matches the end of the module's name.
  """
  for pattern, value in (fields.get(name) or {}).items():
    if _compile_pattern(pattern).match(module):
      return value
  return default


@functools.lru_cache
def _compile_pattern(pattern: str) -> re.Pattern:
  """
  Raises:
    ValueError: it is no regular expression, or its matching could take forever.
  """
  repeats = len(re.findall(r'[*+{]', pattern))
  if len(pattern) > 500 or repeats > 3 or re.search(r'\)[*+{]', pattern):
    raise ValueError(
      f'expected a simple pattern of module names, got {pattern!r:.60}'
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
  """The fields of adapter_config.json that select the adapted modules.

  Args:
    modules: all modules of the model.
    adapted: the modules with an adapter.
    inputs: the modules whose input (IA)^3 scales.
    like: an earlier adapter_config.json, whose selection is kept if it is
      equal.
  """
  is_unchanged = {m for m in modules if selects(like, m)} == set(adapted)
  if is_unchanged:
    fields = {'target_modules': like['target_modules']}
  else:
    fields = {key: None for key in _SELECTION_FIELDS if like.get(key)}
    fields['target_modules'] = _select_names(adapted, modules, _is_submodule)
  if not inputs:
    return fields
  # peft matches suffixes without a dot here: 'o' would match wo, too.
  fields['feedforward_modules'] = _select_names(
    inputs, adapted, str.endswith, like.get('feedforward_modules')
  )
  if _misses_inputs(fields['target_modules'], fields['feedforward_modules']):
    fields['target_modules'] = sorted(adapted)
    fields['feedforward_modules'] = sorted(inputs)
  return fields


def selects(config: Mapping[str, Any], module: str) -> bool:
  """Whether an adapter_config.json selects a module.

  Equal to `peft.tuners.tuners_utils.check_target_module_exists`.
  """
  targets = config.get('target_modules')
  if not targets or _matches(config.get('exclude_modules'), module):
    return False
  if isinstance(targets, str) or module in targets:
    return _matches(targets, module)
  layers = config.get('layers_to_transform')
  if layers is None or layers == []:
    return _matches(targets, module)
  layer = _layer(module, config.get('layers_pattern') or r'[^.]*')
  layers = [layers] if isinstance(layers, int) else layers
  return _matches(targets, module) and layer in layers


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
  return any(_is_submodule(module, name) for name in names or ())


def _is_submodule(module: str, name: str) -> bool:
  return f'.{module}'.endswith(f'.{name}')


def _misses_inputs(targets: Any, inputs: Any) -> bool:
  """Whether peft, which compares strings, would miss an input in targets."""
  if isinstance(targets, str) or isinstance(inputs, str):
    return False
  return not set(inputs) <= set(targets)


def _select_names(
  modules: Collection[str],
  candidates: Collection[str],
  matches: Callable[[str, str], bool],
  earlier: Any = None,
) -> Any:
  """`earlier` if it selects `modules`, else short names, else full names."""
  if isinstance(earlier, str):
    if {m for m in candidates if re.fullmatch(earlier, m)} == set(modules):
      return earlier
    earlier = None
  short = sorted({module.rpartition('.')[2] for module in modules})
  for suffixes in (earlier or short, short):
    selected = {
      m for m in candidates if any(matches(m, end) for end in suffixes)
    }
    if selected == set(modules):
      return suffixes
  return sorted(modules)
