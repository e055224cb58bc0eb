# SPDX-License-Identifier: Apache-2.0
"""Keys of configs that have had another name.

Flags and config files are refused with the new name. The config.json of a run
that was trained before is translated, so that the run still loads.
"""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

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
  """A sentence for a key of before, '' for any other."""
  new = RENAMED.get(key)
  return f'config.{key} is now config.{new}; write that' if new else ''


def check_renamed(config: ConfigDict) -> None:
  """Refuses a config that sets a key of before.

  Raises:
    ValueError: the message has the new name.
  """
  for key in RENAMED:
    section, _, name = key.rpartition('.')
    if name in (config[section] if section else config):
      raise ValueError(message(key))


def translated_method(text: str) -> str:
  """A method string that was stored before, with the options of today."""
  return re.sub(r'\bsites=', 'targets=', text)


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
  """A nested config with the names of today; other keys stay as they are."""
  new = {
    key: dict(value) if isinstance(value, Mapping) else value
    for key, value in config.items()
  }
  for old_key, new_key in RENAMED.items():
    section, _, old = old_key.rpartition('.')
    keys = new.get(section) if section else new
    if isinstance(keys, dict) and old in keys:
      keys.setdefault(new_key.rpartition('.')[2], keys.pop(old))
  if isinstance(new.get('method'), str):
    new['method'] = translated_method(new['method'])
  return new
