# SPDX-License-Identifier: Apache-2.0
"""The modules that an adapter_config.json selects."""

import pytest

from moepeft.checkpoints.hf import peft_config
from moepeft.models import FAMILIES

from ..cases import CONFIGS

CONFIG = CONFIGS['gated-untied']


@pytest.mark.parametrize(
  'fields',
  [
    {'target_modules': ['q', 'v'], 'exclude_modules': ['decoder']},
    {'target_modules': ['k', 'wo'], 'layers_to_transform': [1]},
    {'target_modules': ['k'], 'layers_to_transform': 0},
    {
      'target_modules': ['wi_0', 'encoder.block.1.layer.0.SelfAttention.q'],
      'layers_to_transform': [0],
      'layers_pattern': 'block',
    },
    {'target_modules': r'.*\.(block)\.[02]\..*\.(q|wo)'},
    {'target_modules': ['q'], 'exclude_modules': r'.*EncDec.*'},
  ],
)
def test_modules_are_selected_as_peft_selects_them(fields):
  reference = pytest.importorskip('peft')
  from peft.tuners.tuners_utils import check_target_module_exists

  config = reference.LoraConfig(**fields)
  for module in FAMILIES['t5'].hf.module_names(CONFIG):
    # Its answer may be a match, or an object that says "excluded".
    answer = check_target_module_exists(config, module)
    expected = bool(answer) and 'Excluded' not in type(answer).__name__
    assert peft_config.selects(fields, module) == expected, module
