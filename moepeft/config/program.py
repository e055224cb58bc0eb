# SPDX-License-Identifier: Apache-2.0
"""The part of a config that a compiled training step depends on.

Runs whose configs differ only in the seed and in numbers that a step can take
as arguments have the same program, and can be trained by one vmapped step.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from moepeft.core.ranges import is_zero

# Keys whose values enter a step as numbers: they change no shape, and no code
# branches on them but where they are 0 and their term is left out.
_NUMBERS = (
  *('optimizer.learning_rate', 'optimizer.weight_decay', 'loss.z_loss'),
)
_SECTION_OF_NUMBERS = 'router_losses'
_SEED = 'seed'


def numbers(config: ConfigDict) -> dict[str, float]:
  """{key: value} of the numbers that a step can take as arguments, but 0."""
  section = (f'{_SECTION_OF_NUMBERS}.{k}' for k in config[_SECTION_OF_NUMBERS])
  values = {
    key: config_path.get_value(key, config) for key in (*_NUMBERS, *section)
  }
  return {key: value for key, value in values.items() if not is_zero(value)}


def with_numbers(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """The config with other numbers, which may be arrays that are traced."""
  config = config.copy_and_resolve_references()
  with config.unlocked(), config.ignore_type():
    for key, value in values.items():
      config_path.set_value(key, config, value)
  return config


def fingerprint(config: ConfigDict) -> str:
  """A text that is equal for configs whose steps are one program."""
  placeholders = dict.fromkeys(numbers(config), 'a number')
  return json.dumps(
    json.loads(with_numbers(config, {_SEED: 0} | placeholders).to_json()),
    sort_keys=True,
  )
