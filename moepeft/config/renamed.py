# SPDX-License-Identifier: Apache-2.0
"""Renamed config keys.

Flags and config files with an old key are refused with a message that has the
new key. The config.json of an older run is translated, so that it still loads.
"""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Old key -> new key.
RENAMED = {
  'accumulate': 'gradient_accumulation_steps',
  'patience': 'early_stopping_patience',
  'router_alarm': 'router_collapse_threshold',
  'loss.per': 'loss.average_over',
  'loss.z': 'loss.z_loss',
  'preference.sft': 'preference.sft_weight',
  'preference.desirable': 'preference.desirable_weight',
  'preference.undesirable': 'preference.undesirable_weight',
  'model.quantise': 'model.quantize',
  'model.unroll': 'model.scan_unroll',
  'data.vocabulary': 'data.tokenizer',
  'data.module': 'imports',
  'data.cap': 'data.max_examples_per_task',
  'data.form': 'data.format',
  'data.system': 'data.system_prompt',
  'data.too_long': 'data.truncation',
  'data.predict': 'data.pretraining_objective',
  'data.noise': 'data.noise_density',
  'data.span': 'data.mean_noise_span_length',
  'data.duplicates': 'data.dedup_threshold',
  'data.quality': 'data.quality_filters',
  'data.held_out': 'data.validation_fraction',
  'data.ignore': 'data.ignore_fields',
  'data.workers': 'data.num_workers',
  'optimizer.clip': 'optimizer.max_grad_norm',
  'optimizer.clock': 'optimizer.decay_initial_step',
  'sharding.model': 'sharding.model_parallel_size',
  'evaluation.batches': 'evaluation.max_batches',
  'log.wandb': 'log.wandb_project',
  'checkpoint.keep': 'checkpoint.max_to_keep',
  'checkpoint.best': 'checkpoint.keep_best',
}


def message(key: str) -> str:
  """The error message for an old key, '' for any other key."""
  new = RENAMED.get(key)
  return f'config.{key} is now config.{new}; write that' if new else ''


def check_renamed(config: ConfigDict) -> None:
  """Refuses a config that sets an old key.

  Raises:
    ValueError: the message has the new key.
  """
  for key in RENAMED:
    section, _, name = key.rpartition('.')
    if name in (config[section] if section else config):
      raise ValueError(message(key))


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Renames the old keys of a nested config."""
  new = {
    key: dict(value) if isinstance(value, Mapping) else value
    for key, value in config.items()
  }
  for old_key, new_key in RENAMED.items():
    old_section, old_name = _parent(new, old_key)
    if old_name not in old_section:
      continue
    value = old_section.pop(old_name)
    section, name = _parent(new, new_key)
    # Two old keys became config.imports: --imports and SeqIO's.
    if not section.get(name):
      section[name] = value
    elif value and new_key == 'imports':
      section[name] = f'{section[name]},{value}'
  if isinstance(new.get('method'), str):
    new['method'] = translate_method(new['method'])
  return new


def translate_method(text: str) -> str:
  """Renames the old options of a method string."""
  return re.sub(r'\bsites=', 'targets=', text)


def _parent(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
  """(the dict of a key's section, the key's last part).

  The dict is {} if the section is not a dict.
  """
  section, _, name = key.rpartition('.')
  parent = config.get(section) if section else config
  return (parent if isinstance(parent, dict) else {}), name
