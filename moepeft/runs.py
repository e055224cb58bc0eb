# SPDX-License-Identifier: Apache-2.0
"""Opens what `moepeft.train` left in a work directory."""

import json
import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft import base as base_lib
from moepeft.checkpoint import card, restore_trained
from moepeft.data import vocabulary


def open_run(workdir: str):
  """(config, model, variables, vocabulary, step) of a trained run.

  Raises:
    ValueError: no run is there, or its base has changed since.
  """
  path = os.path.join(workdir, 'config.json')
  if not os.path.exists(path):
    raise ValueError(f'{workdir!r} is no work directory: it has no config.json')
  with open(path) as f:
    config = ConfigDict(json.load(f))
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  trained, found = restore_trained(workdir)
  now = card(base, built, config.seed, config.model.family)
  if found['base'] != now['base']:
    raise ValueError(
      f'the base {base.path!r} is not the one that {workdir!r} was trained on '
      '(its content hash differs); put the old one back'
    )
  variables = {'params': base.params, 'peft': {}} | {built.trainable: trained}
  variables = jax.tree.map(jnp.asarray, variables)
  words = vocabulary(config.data.vocabulary, config.model.path)
  return config, model, variables, words, found['step']
