# SPDX-License-Identifier: Apache-2.0
"""What the values of a config may be, looked at before anything is built."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from moepeft.config.defaults import default
from moepeft.config.ranges import ALLOWED, TEXTS
from moepeft.core.ranges import Choices, shortened
from moepeft.core.registry import Registry

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


def check_entry(c: ConfigDict, key: str, registry: Registry) -> None:
  """Looks at a key that names a registry's entry, and at what entries read.

  Args:
    key: 'objective', 'optimizer.name', ...
    registry: its entries have `config_keys`, the keys that each of them reads.

  Raises:
    ValueError: there is no such entry, or a key is set that other entries read
      and this one does not.
  """
  name = _value(c, key)
  Choices(tuple(registry)).check(f'config.{key}', name)
  readers: dict[str, list[str]] = {}
  for entry_name, entry in registry.items():
    for config_key in entry.config_keys:
      readers.setdefault(config_key, []).append(entry_name)
  defaults = dict(_flatten(default()))
  for config_key, names in readers.items():
    # A section that a user's own entry reads has no defaults.
    if name in names or config_key not in defaults:
      continue
    value = _value(c, config_key)
    if value != defaults[config_key]:
      raise ValueError(
        f'config.{config_key}={value!r} does nothing with '
        f'config.{key}={name!r}, only with {" or ".join(names)}; set one of '
        'the two'
      )


def _flatten(c: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in c.items():
    if isinstance(value, ConfigDict):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


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
