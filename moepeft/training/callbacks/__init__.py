# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the training loop: logging, validation, checkpoints, ...

A new one is a file and a line here; docs/extending/callback.md has a worked
example.
"""

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from moepeft.core.registry import Registry
from moepeft.training.callbacks.callback import Callback as Callback
from moepeft.training.callbacks.callback import CallbackEntry as CallbackEntry

CALLBACKS = Registry(
  'callback',
  'moepeft.training.callbacks',
  {
    'metrics_logging': 'metrics_logging:METRICS_LOGGING',
    'held_out_evaluation': 'evaluation:EVALUATION',
    'early_stopping': 'early_stopping:EARLY_STOPPING',
    'signal_handling': 'signals:SIGNAL_HANDLING',
    'checkpointing': 'checkpointing:CHECKPOINTING',
    'plotting': 'plotting:PLOTTING',
    'task_routing': 'task_routing:TASK_ROUTING',
    'profiling': 'profiling:PROFILING',
  },
)


def build_callbacks(config: ConfigDict) -> list[Callback]:
  """The callbacks that a config enables, in the order in which they run.

  Raises:
    ValueError: config.callbacks has an unknown name, or a callback refuses a
      value.
  """
  names = [name.strip() for name in config.callbacks.split(',') if name.strip()]
  entries = {name: CALLBACKS.lookup(name) for name in names}
  for name, entry in CALLBACKS.items():
    if any(config_path.get_value(key, config) for key in entry.enabled_by):
      entries.setdefault(name, entry)
  ordered = sorted(entries.values(), key=lambda entry: entry.order)
  return [entry.build(config) for entry in ordered]
