# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts parameter-efficient fine-tuning in JAX and Flax.

  import moepeft

  model = moepeft.load('smollm2', adapter='workdirs/sft')
  model.generate(['What is LoRA?'], routing=True)

Names are imported at their first use, so that `import moepeft` and the commands
start fast. docs/api.md is the guide.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

# {name: its module}; no name equals that of a submodule.
_EXPORTS = {
  'Answer': 'moepeft.library',
  'Model': 'moepeft.library',
  'fit': 'moepeft.train',
  'load': 'moepeft.library',
  'load_config': 'moepeft.library',
  'CALLBACKS': 'moepeft.training.callbacks',
  'FAMILIES': 'moepeft.models',
  'METHODS': 'moepeft.peft.methods',
  'METRICS': 'moepeft.metrics',
  'OBJECTIVES': 'moepeft.objectives',
  'OPTIMIZERS': 'moepeft.training.optimizers',
  'READERS': 'moepeft.data.readers',
  'ROUTERS': 'moepeft.moe',
  'SCHEDULES': 'moepeft.training.optimizers',
  'TASKS': 'moepeft.tasks',
  'TRACKERS': 'moepeft.runs.trackers',
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
  if name not in _EXPORTS:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
