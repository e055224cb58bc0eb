# SPDX-License-Identifier: Apache-2.0
"""What the values of a config may be, looked at before anything is built."""

from typing import Any

from ml_collections import ConfigDict

from moepeft.config.defaults import default
from moepeft.config.ranges import ALLOWED, TEXTS
from moepeft.core.ranges import shortened

# What each source and optimizer looks at; elsewhere a value would be lost.
_OF_SOURCES = {
  'path': ('jsonl', 'datasets', 'seqio', 'chat', 'preference', 'text'),
  'split': ('datasets', 'seqio', 'preference'),
  'templates': ('jsonl', 'datasets'),
  'mixture': ('jsonl', 'datasets', 'seqio'),
  'module': ('seqio',),
  'cap': ('jsonl', 'datasets'),
  'temperature': ('jsonl', 'datasets'),
  'on_bad_row': ('jsonl', 'datasets', 'chat', 'preference', 'text'),
  'ignore': ('jsonl', 'datasets', 'chat', 'preference', 'text'),
  'form': ('chat', 'preference'),
  'chat_template': ('chat', 'preference'),
  'date': ('chat', 'preference'),
  'system': ('chat', 'preference'),
  'train_on': ('chat', 'preference'),
  'too_long': ('tasks', 'jsonl', 'datasets', 'seqio', 'chat', 'preference'),
  'workers': ('tasks', 'jsonl', 'datasets', 'chat', 'preference', 'text'),
}
# Of plain text, the source's or what is replayed.
_OF_TEXT = ('predict', 'noise', 'span', 'duplicates', 'quality')
_OF_OPTIMIZERS = {
  'b1': ('adamw',),
  'b2': ('adamw',),
  'clock': ('adafactor',),
}


def check(c: ConfigDict) -> None:
  """Looks at a config before anything is built.

  Raises:
    ValueError: a value is outside of its range or none of its choices, or a
      key is set that nothing would look at; the message names the key.
  """
  check_ranges(c)
  _demand_used(c, 'data', 'source', _OF_SOURCES)
  _demand_used(c, 'optimizer', 'name', _OF_OPTIMIZERS)
  _demand_text(c.data)
  if (c.patience or c.checkpoint.best) and not c.evaluation.every_steps:
    raise ValueError(
      'config.patience and config.checkpoint.best go by validation losses; set '
      'config.evaluation.every_steps too'
    )


def check_ranges(c: ConfigDict) -> None:
  """
  Raises:
    ValueError: a value is outside of its range, none of its choices, or no
      text where a text is expected.
  """
  for key, allowed in ALLOWED.items():
    allowed.check(f'config.{key}', _value(c, key))
  for key in TEXTS:
    if not isinstance(_value(c, key), str):
      raise ValueError(
        f'config.{key} is a text; got {shortened(_value(c, key))}'
      )


def _value(c: ConfigDict, key: str) -> Any:
  for part in key.split('.'):
    c = c[part]
  return c


def _demand_used(c: ConfigDict, section: str, kind: str, of: dict) -> None:
  """Refuses keys that were set and that the section's kind ignores."""
  plain, own = default()[section], c[section]
  for key, kinds in of.items():
    if own[key] != plain[key] and own[kind] not in kinds:
      raise ValueError(
        f'config.{section}.{key}={own[key]!r} does nothing with '
        f'config.{section}.{kind}={own[kind]!r}, only with '
        f'{" or ".join(kinds)}; set one of the two'
      )


def _demand_text(data: ConfigDict) -> None:
  """Refuses keys of plain text where there is none, or that it ignores."""
  plain = default().data
  changed = [key for key in _OF_TEXT if data[key] != plain[key]]
  if changed and data.source != 'text' and not data.replay:
    raise ValueError(
      f'config.data.{changed[0]}={data[changed[0]]!r} does nothing with '
      f'config.data.source={data.source!r}, only with plain text (the source '
      "'text', or config.data.replay); set one of the two"
    )
  spans = [key for key in changed if key in ('noise', 'span')]
  if spans and data.predict != 'spans':
    raise ValueError(
      f'config.data.{spans[0]}={data[spans[0]]!r} does nothing with '
      f"config.data.predict={data.predict!r}, only with 'spans'; set one of "
      'the two'
    )
  if (data.replay or data.replay_rate) and data.source == 'preference':
    raise ValueError(
      'config.data.replay does nothing with config.data.source='
      "'preference', whose rows have several sides; leave it and "
      'config.data.replay_rate out'
    )
