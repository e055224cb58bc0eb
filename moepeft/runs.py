# SPDX-License-Identifier: Apache-2.0
"""Opens what `moepeft.train` left in a work directory."""

import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft import base as base_lib
from moepeft import config as config_lib
from moepeft.checkpoint import card, restore_trained
from moepeft.data import vocabulary
from moepeft.models import names

CONFIG = 'config.json'


# What a run may change when it goes on: nothing that a step depends on, but
# for the order of its sums (sharding). The base and the rest of the method are
# compared by the checkpoint's card.
_FREE = (
  'steps',
  'router_alarm',
  'patience',
  'data.workers',
  'model.path',
  'model.adapter',
  'model.remat',
  'model.unroll',
  'sharding',
  'evaluation',
  'checkpoint',
  'log',
)


def check_unchanged(
  workdir: str, config: ConfigDict, may_differ: Sequence[str] = ()
) -> None:
  """Compares a config with the one that a work directory was begun with.

  Args:
    may_differ: keys, or beginnings of keys, that need not be equal.

  Raises:
    ValueError: a key differs, by name.
  """
  checkpoints = os.path.join(workdir, 'checkpoints')
  if not os.path.isdir(checkpoints) or not any(
    name.isdigit() for name in os.listdir(checkpoints)
  ):
    # Nothing is there to go on from.
    return
  if not os.path.exists(os.path.join(workdir, CONFIG)):
    return
  before = names.flatten(_read(workdir))
  now = names.flatten(json.loads(config.to_json()))
  free = _FREE
  if now['optimizer/schedule'] != 'constant':
    # The rate falls to zero at the last step.
    free = tuple(key for key in free if key != 'steps')
  free += tuple(key.removeprefix('config.') for key in may_differ)
  prefixes = tuple(f'{key.replace(".", "/")}/' for key in free)
  for key in sorted(before.keys() & now.keys()):
    if before[key] != now[key] and not f'{key}/'.startswith(prefixes):
      dotted = key.replace('/', '.')
      raise ValueError(
        f'{workdir!r} holds a run with config.{dotted}={before[key]!r}, now it '
        f'is {now[key]!r}; set it back, choose another --workdir, or allow it '
        f'with --may_differ={dotted}'
      )


def _read(workdir: str) -> dict[str, Any]:
  path = os.path.join(workdir, CONFIG)
  try:
    with open(path) as f:
      return json.load(f)
  except ValueError as e:
    raise ValueError(
      f'{path} is damaged ({e}); give the command that began the run once '
      'more, in a new --workdir, and copy its config.json'
    ) from None


def open_run(workdir: str, which: str = ''):
  """(config, model, variables, vocabulary, step) of a trained run.

  Args:
    which: checkpoint; see `Checkpoints.restore_trainable`.

  Raises:
    ValueError: no run is there, or its base has changed since.
  """
  if not os.path.exists(os.path.join(workdir, CONFIG)):
    raise ValueError(f'{workdir!r} is no work directory: it has no {CONFIG}')
  config = config_lib.default()
  with config.unlocked():
    config.update(_read(workdir))
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  trained, found = restore_trained(workdir, which)
  now = card(base, built, config.seed, config.model.family)
  if found['base']['sha256'] != now['base']['sha256']:
    raise ValueError(
      f'the base {base.path!r} is not the one that {workdir!r} was trained on '
      '(its content hash differs); put the old one back'
    )
  variables = {'params': base.params, 'peft': {}} | {built.trainable: trained}
  variables = jax.tree.map(jnp.asarray, variables)
  words = vocabulary(config.data.vocabulary, config.model.path)
  return config, model, variables, words, found['step']
