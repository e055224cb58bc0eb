# SPDX-License-Identifier: Apache-2.0
"""The registries whose entries a config names, by the key that names them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.models import FAMILIES
from moepeft.objectives import OBJECTIVES
from moepeft.training.optimizers import OPTIMIZERS, SCHEDULES


@dataclasses.dataclass(frozen=True)
class _Keys:
  """Stands for an entry that has no facts yet."""

  config_keys: tuple[str, ...]


def _table(
  section: str, names: str, readers: Mapping[str, str]
) -> dict[str, _Keys]:
  """Entries from {key: names of those that read it}."""
  return {
    name: _Keys(
      tuple(f'{section}.{key}' for key, of in readers.items() if name in of)
    )
    for name in names.split()
  }


# TODO: goes when readers have a registry of their own.
_ROWS = ('jsonl', 'datasets')
_CHATS = ('chat', 'preference')
_READERS = _table(
  'data',
  'tasks jsonl datasets seqio chat preference text',
  {
    'path': (*_ROWS, 'seqio', *_CHATS, 'text'),
    'split': ('datasets', 'seqio', 'preference'),
    'templates': _ROWS,
    'mixture': (*_ROWS, 'seqio'),
    'module': ('seqio',),
    'max_examples_per_task': _ROWS,
    'temperature': _ROWS,
    'on_bad_row': (*_ROWS, *_CHATS, 'text'),
    'ignore_fields': (*_ROWS, *_CHATS, 'text'),
    'format': _CHATS,
    'chat_template': _CHATS,
    'date': _CHATS,
    'system_prompt': _CHATS,
    'train_on': _CHATS,
    'truncation': ('tasks', *_ROWS, 'seqio', *_CHATS),
    'num_workers': ('tasks', *_ROWS, *_CHATS, 'text'),
    'replay': ('tasks', *_ROWS, 'seqio', 'chat', 'text'),
    'replay_rate': ('tasks', *_ROWS, 'seqio', 'chat', 'text'),
    'pretraining_objective': ('text',),
    'noise_density': ('text',),
    'mean_noise_span_length': ('text',),
    'dedup_threshold': ('text',),
    'quality_filters': ('text',),
  },
)
BY_KEY: Mapping[str, Mapping[str, Any]] = {
  'model.family': FAMILIES,
  'objective': OBJECTIVES,
  'data.source': _READERS,
  'optimizer.name': OPTIMIZERS,
  'optimizer.schedule': SCHEDULES,
}
