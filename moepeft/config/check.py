# SPDX-License-Identifier: Apache-2.0
"""Checks a config before a run builds anything."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from moepeft.config import renamed, suggestions
from moepeft.config.defaults import default
from moepeft.config.ranges import ALLOWED, TEXTS
from moepeft.core.ranges import Choices, nearest, short_repr

# Sections of keys that the config does not list.
_OPEN_SECTIONS = ('router_losses',)
# data.replay mixes plain text in, so any data.source reads these with it.
_REPLAY_KEYS = tuple(
  f'data.{key}'
  for key in (
    'pretraining_objective',
    'noise_density',
    'mean_noise_span_length',
    'dedup_threshold',
    'quality_filters',
  )
)


def check(
  config: ConfigDict, registries: Mapping[str, Mapping[str, Any]]
) -> None:
  """Checks a config's keys and values, and which keys have no effect.

  Args:
    registries: config key that names an entry -> registry;
      `moepeft.registries.BY_KEY`.

  Raises:
    ValueError: a value is out of range or not one of the choices, or a key is
      set that no code reads; the message names the key.
  """
  check_ranges(config)
  check_keys(config, registries)
  for key, registry in registries.items():
    is_replaying = key == 'data.source' and config.data.replay
    check_entry(config, key, registry, _REPLAY_KEYS if is_replaying else ())
  _check_span_corruption(config.data)
  if config.log.plots_every_steps and not config.log.plots:
    raise ValueError(
      f'config.log.plots_every_steps={config.log.plots_every_steps} does '
      'nothing with config.log.plots=False; set one of the two'
    )
  if (
    config.early_stopping_patience or config.checkpoint.keep_best
  ) and not config.evaluation.every_steps:
    raise ValueError(
      'config.early_stopping_patience and config.checkpoint.keep_best need '
      'validation losses; set config.evaluation.every_steps too'
    )


def check_keys(
  config: ConfigDict, registries: Mapping[str, Mapping[str, Any]]
) -> None:
  """Refuses keys that no code reads, which a config file may set.

  These are allowed: the weights of `router_losses` and the fields of
  `model.shape`, which are checked where they are read, keys in an entry's
  `config_keys`, and sections that the user adds.

  Args:
    registries: as for `check`.

  Raises:
    ValueError: there is no such key; the message names it and the nearest key.
  """
  known_keys = {
    config_key
    for registry in registries.values()
    for entry in registry.values()
    for config_key in getattr(entry, 'config_keys', ())
  }
  known_keys |= set(suggestions.keys())
  sections = {key.partition('.')[0] for key in known_keys if '.' in key}
  for key in suggestions.keys(config):
    section, dot, _ = key.partition('.')
    if key in known_keys or section in _OPEN_SECTIONS:
      continue
    if dot and section not in sections:
      if not nearest(section, sections):
        continue
      # The whole section is mistyped.
      suggestion = f'config.{nearest(section, sections)}'
      raise ValueError(
        f'there is no config.{section}; did you mean {suggestion}?'
      )
    raise ValueError(suggestions.no_such_key(key, sorted(known_keys)))


def check_entry(
  config: ConfigDict,
  key: str,
  registry: Mapping[str, Any],
  always_read: tuple[str, ...] = (),
) -> None:
  """Checks a key that names a registry's entry, and the keys of all entries.

  Args:
    key: 'objective', 'optimizer.name', ... An empty value is not checked if it
      is the default.
    registry: name -> entry. An entry lists the config keys in `config_keys`
      that it reads and other entries ignore.
    always_read: keys that are read with every entry.

  Raises:
    ValueError: there is no such entry, or a key is set that only other entries
      read.
  """
  name = config_path.get_value(key, config)
  defaults = dict(_flatten(default()))
  if name == '' == defaults[key]:
    return
  Choices(tuple(registry)).check(f'config.{key}', name)
  readers: dict[str, list[str]] = {}
  for entry_name, entry in registry.items():
    for config_key in getattr(entry, 'config_keys', ()):
      readers.setdefault(config_key, []).append(entry_name)
  for config_key, names in readers.items():
    # Sections that a user's entries add have no defaults.
    if name in names or config_key not in defaults:
      continue
    value = config_path.get_value(config_key, config)
    if value != defaults[config_key] and config_key not in always_read:
      raise ValueError(
        f'config.{config_key}={value!r} does nothing with '
        f'config.{key}={name!r}, only with {" or ".join(names)}; set one of '
        'the two'
      )


def check_ranges(config: ConfigDict) -> None:
  """Checks the values of a config one by one.

  Raises:
    ValueError: a value is out of range, not one of the choices or not a text,
      or a key was renamed.
  """
  renamed.check_renamed(config)
  for key, allowed in ALLOWED.items():
    allowed.check(f'config.{key}', config_path.get_value(key, config))
  for key in TEXTS:
    value = config_path.get_value(key, config)
    if not isinstance(value, str):
      raise ValueError(f'config.{key} is a text; got {short_repr(value)}')


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _check_span_corruption(data: ConfigDict) -> None:
  """Refuses options of span corruption with other pretraining objectives."""
  defaults = default().data
  for key in ('noise_density', 'mean_noise_span_length'):
    if data[key] != defaults[key] and data.pretraining_objective != 'spans':
      raise ValueError(
        f'config.data.{key}={data[key]!r} does nothing with '
        f'config.data.pretraining_objective={data.pretraining_objective!r}, '
        "only with 'spans'; set one of the two"
      )
