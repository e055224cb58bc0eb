# SPDX-License-Identifier: Apache-2.0
"""The methods. A new one is one file and one line in METHODS.

docs/extending/method.md has a worked example.
"""

from moepeft.core.registry import Registry

METHODS: Registry = Registry(
  'method',
  'moepeft.peft.methods',
  {
    'full': 'full:METHOD',
    'lora': 'lora:METHOD',
    'dora': 'dora:METHOD',
    'adalora': 'adalora:METHOD',
    'ffn_lora': 'ffn_lora:METHOD',
    'bottleneck': 'bottleneck:METHOD',
    'moslora': 'moslora:METHOD',
    'ia3': 'ia3:METHOD',
    'vera': 'vera:METHOD',
    'bitfit': 'bitfit:METHOD',
    'ln_tuning': 'ln_tuning:METHOD',
    'mixture': 'presets:MIXTURE',
    'mov': 'presets:MOV',
    'molora': 'presets:MOLORA',
    'mixlora': 'presets:MIXLORA',
    'mola': 'presets:MOLA',
    'hydralora': 'presets:HYDRALORA',
    'adamole': 'presets:ADAMOLE',
    'flylora': 'presets:FLYLORA',
    'arrow': 'presets:ARROW',
    'phatgoose': 'presets:PHATGOOSE',
    'hardrouted': 'presets:HARDROUTED',
    'xlora': 'presets:XLORA',
    'comol': 'presets:COMOL',
    'dynmole': 'presets:DYNMOLE',
    'ldmole': 'presets:LDMOLE',
    'loramoe': 'presets:LORAMOE',
    'moelora': 'presets:MOELORA',
    'smear': 'presets:SMEAR',
    'poly': 'presets:POLY',
    'mhr': 'presets:MHR',
    'goat': 'presets:GOAT',
    'hmora': 'presets:HMORA',
    'adamix': 'presets:ADAMIX',
    'lily': 'presets:LILY',
    'mode': 'presets:MODE',
    'moa': 'presets:MOA',
    'tokens': 'tokens:METHOD',
    'prompt': 'prompt_tuning:METHOD',
    'p_tuning': 'p_tuning:METHOD',
    'prefix': 'prefix_tuning:METHOD',
  },
)
