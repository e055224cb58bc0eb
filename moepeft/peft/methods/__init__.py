# SPDX-License-Identifier: Apache-2.0
"""The methods. A new one is one file and one line in METHODS."""

from moepeft.core.registry import Registry

METHODS: Registry = Registry(
  'method',
  'moepeft.peft.methods',
  {
    'full': 'full:METHOD',
    'lora': 'lora:METHOD',
    'dora': 'dora:METHOD',
    'ia3': 'ia3:METHOD',
    'mov': 'mov:METHOD',
    'molora': 'molora:METHOD',
    'tokens': 'tokens:METHOD',
    'prompt': 'prompt_tuning:METHOD',
  },
)
