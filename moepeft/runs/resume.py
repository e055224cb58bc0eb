# SPDX-License-Identifier: Apache-2.0
"""Checks that a run which goes on is the run that was begun."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moepeft.runs.run import Run, read_object

# Keys that may change when a run goes on: nothing that a step depends on, but
# for the order of its sums (sharding). The base and the rest of the method are
# compared by the checkpoint's metadata.
_FREE = (
  'imports',
  'router_collapse_threshold',
  'early_stopping_patience',
  'data.num_workers',
  'model.path',
  'model.adapter',
  'model.remat',
  'model.scan_unroll',
  'sharding',
  'evaluation',
  'checkpoint',
  'log',
  'profile',
  'callbacks',
)


def check_unchanged(
  run: Run, config: ConfigDict, may_differ: Sequence[str] = ()
) -> None:
  """Compares a config with the one that a run was begun with.

  Args:
    may_differ: keys, or beginnings of keys, that need not be equal.

  Raises:
    ValueError: a key differs, by name.
  """
  if not _can_resume(run, run.config_file):
    return
  begun = flatten(run.read_config())
  now = flatten(json.loads(config.to_json()))
  free = (*_FREE, *(key.removeprefix('config.') for key in may_differ))
  prefixes = tuple(f'{key}.' for key in free)
  for key in sorted(begun.keys() & now.keys()):
    if begun[key] != now[key] and not f'{key}.'.startswith(prefixes):
      raise ValueError(
        f'{run.path!r} holds a run with config.{key}={begun[key]!r}, now it '
        f'is {now[key]!r}; set it back, choose another --workdir, or allow it '
        f'with --may_differ={key}'
      )


def with_begun_date(run: Run, config: ConfigDict) -> ConfigDict:
  """A config with the date that a run's chat template has written so far.

  Args:
    run: one that goes on, or a new one.
    config: its config.data.date stays where it is set.
  """
  if config.data.date or not _can_resume(run, run.config_file):
    return config
  config = config.copy_and_resolve_references()
  config.data.date = run.read_config().get('data', {}).get('date', '')
  return config


def check_same_data(
  run: Run,
  hashes: Mapping[str, Mapping[str, str]],
  may_differ: Sequence[str] = (),
) -> None:
  """Compares data's files with those that a run was begun with.

  Runs of before these were recorded go on.

  Args:
    hashes: from `moepeft.data.fingerprint.hashes`.
    may_differ: as of `check_unchanged`.

  Raises:
    ValueError: a file has changed, is new, or is gone; the message names it.
  """
  if not _can_resume(run, run.data_file):
    return
  begun = read_object(
    run.data_file,
    {str: {str: str}},
    'allow other data with --may_differ=data, after removing it',
  )
  free = tuple(f'{key.removeprefix("config.")}.' for key in may_differ)
  for key in sorted(begun.keys() & hashes.keys()):
    if f'data.{key}.'.startswith(free):
      continue
    old, new = begun[key], hashes[key]
    for name in sorted(old.keys() | new.keys()):
      if old.get(name) != new.get(name):
        change = 'is gone' if name not in new else 'has changed'
        raise ValueError(
          f'{name!r} of config.data.{key} '
          f'{change if name in old else "is new"} since the run in '
          f'{run.path!r} read it; put it back as it was, choose another '
          f'--workdir, or allow it with --may_differ=data.{key}'
        )


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} as {'a.b': 1}; lists become tuples."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = tuple(value) if type(value) is list else value
  return flat


def _can_resume(run: Run, file: str) -> bool:
  """Whether the run has a checkpoint to go on from, and the file."""
  return run.latest_step() is not None and os.path.exists(file)
