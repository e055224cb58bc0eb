# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json of Hugging Face's `peft`: its checks and selections."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from moepeft.interop import files, peft_prompt
from moepeft.models.names import CheckpointError

FILE = 'adapter_config.json'
# Fields that are read, or do not change what a trained adapter computes; a
# field that is not here must be empty.
_HARMLESS = frozenset(
  """
  auto_mapping base_model_name_or_path corda_config ensure_weight_tying
  eva_config exclude_modules fan_in_fan_out feedforward_modules inference_mode
  init_ia3_weights layers_pattern layers_to_transform lora_alpha
  lora_dropout megatron_core peft_type peft_version qalora_group_size r
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
  """The file of an adapter that `moepeft.interop.peft` understands whole.

  Raises:
    CheckpointError: it is absent or damaged, or says something else.
  """
  fields = files.read_json(Path(path) / FILE)
  kind = fields.get('peft_type')
  if kind not in ('LORA', 'IA3', peft_prompt.KIND):
    raise CheckpointError(
      f'{path} is a peft adapter of the type {kind!r}; LORA, IA3 and '
      f'{peft_prompt.KIND} are supported'
    )
  if kind == 'LORA' and not (fields.get('r') and 'lora_alpha' in fields):
    raise CheckpointError(
      f'{path}/{FILE} lacks r or lora_alpha: save the adapter again with peft'
    )
  harmless = _HARMLESS | (_OF_PROMPTS if kind == peft_prompt.KIND else set())
  for name, value in sorted(fields.items()):
    plain = not value or value in _NEUTRAL.get(name, ())
    if name not in harmless and not plain:
      raise CheckpointError(
        f'{path}/{FILE} sets {name}={value!r}, which is not supported: '
        'merge the adapter into its base with peft (merge_and_unload) and '
        'convert the merged model'
      )
  return fields


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
