# SPDX-License-Identifier: Apache-2.0
"""Checks that a resumed run has the config and data it was started with."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moepeft.config import budget
from moepeft.runs.run import Run, read_object

# Config keys that may change when a run is resumed: no step depends on them,
# except by the order of sums (sharding). The checkpoint's metadata has the
# base and the adapter.
_MAY_CHANGE = (
  'imports',
  'solved_from',
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
  """Compares a config with the one that a run was started with.

  Args:
    may_differ: keys or sections that need not be equal.

  Raises:
    ValueError: a key differs; the message names it.
  """
  if not _can_resume(run, run.config_file):
    return
  old_config = flatten(run.read_config())
  new_config = flatten(json.loads(config.to_json()))
  free = (*_MAY_CHANGE, *(key.removeprefix('config.') for key in may_differ))
  prefixes = tuple(f'{key}.' for key in free)
  for key in sorted(old_config.keys() & new_config.keys()):
    old, new = old_config[key], new_config[key]
    if old != new and not f'{key}.'.startswith(prefixes):
      raise ValueError(
        f'{run.path!r} holds a run with config.{key}={old!r}, now it is '
        f'{new!r}; set it back, choose another --workdir, or allow it with '
        f'--may_differ={key}'
      )


def with_start_date(run: Run, config: ConfigDict) -> ConfigDict:
  """Sets config.data.date of a resumed run to the date of its first start.

  Args:
    run: a run to resume, or a new one.
    config: unchanged if config.data.date is set.
  """
  if config.data.date or not _can_resume(run, run.config_file):
    return config
  config = config.copy_and_resolve_references()
  config.data.date = run.read_config().get('data', {}).get('date', '')
  return config


def with_stored_method(run: Run, config: ConfigDict) -> ConfigDict:
  """Sets the method of a resumed run that was solved from a budget or a scale.

  Args:
    run: a run to resume, or a new one.
    config: unchanged if its method is explicit, or the run's was solved from
      another request.
  """
  request = budget.request(config)
  if not request or not _can_resume(run, run.config_file):
    return config
  stored = run.read_config()
  if stored.get('solved_from') != request:
    return config
  return budget.solved(config, stored['method'])


def check_same_data(
  run: Run,
  hashes: Mapping[str, Mapping[str, str]],
  may_differ: Sequence[str] = (),
) -> None:
  """Compares the data files with those that a run was started with.

  Runs that are older than data.json are not checked.

  Args:
    hashes: from `moepeft.data.fingerprint.hashes`.
    may_differ: as for `check_unchanged`.

  Raises:
    ValueError: a file has changed, is new, or is gone; the message names it.
  """
  if not _can_resume(run, run.data_file):
    return
  old_hashes = read_object(
    run.data_file,
    {str: {str: str}},
    'allow other data with --may_differ=data, after removing it',
  )
  free = tuple(f'{key.removeprefix("config.")}.' for key in may_differ)
  for key in sorted(old_hashes.keys() & hashes.keys()):
    if f'data.{key}.'.startswith(free):
      continue
    old, new = old_hashes[key], hashes[key]
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
  """Flattens {'a': {'b': 1}} to {'a.b': 1}; lists become tuples."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = tuple(value) if type(value) is list else value
  return flat


def _can_resume(run: Run, file: str) -> bool:
  """Whether the run has a checkpoint to resume from, and the file."""
  return run.latest_step() is not None and os.path.exists(file)
