# SPDX-License-Identifier: Apache-2.0
"""Opens what `moepeft.train` left in a work directory."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.checkpoints.manager import card, restore_trained
from moepeft.config import defaults as config_lib
from moepeft.core.types import Tree
from moepeft.data import load_tokenizer
from moepeft.data.chat import template as chat_template
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference import prompts
from moepeft.models import check_decodes, weight_mapping
from moepeft.peft import Built
from moepeft.runs import config as run_config

CONFIG = run_config.NAME
DATA = 'data.json'


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
  if not _begun(workdir, CONFIG):
    return
  before = weight_mapping.flatten(run_config.read(workdir))
  now = weight_mapping.flatten(json.loads(config.to_json()))
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


def dated(workdir: str, config: ConfigDict) -> ConfigDict:
  """A config with the date that a run's chat template has written so far.

  Args:
    workdir: of a run that goes on, or of a new one.
    config: its config.data.date stays where it is set.
  """
  if config.data.date or not _begun(workdir, CONFIG):
    return config
  config = config.copy_and_resolve_references()
  config.data.date = run_config.read(workdir).get('data', {}).get('date', '')
  return config


def check_same_data(
  workdir: str, found: dict[str, dict[str, str]], may_differ: Sequence[str] = ()
) -> None:
  """Compares data's files with those that a work directory was begun with.

  Runs of before these were kept go on.

  Args:
    found: of `moepeft.data.fingerprint.hashes`.
    may_differ: as of `check_unchanged`.

  Raises:
    ValueError: a file has changed, is new, or is gone; the message names it.
  """
  if not _begun(workdir, DATA):
    return
  before = run_config.read_object(
    os.path.join(workdir, DATA),
    {str: {str: str}},
    'allow other data with --may_differ=data, after removing it',
  )
  free = tuple(f'{key.removeprefix("config.")}.' for key in may_differ)
  for key in sorted(before.keys() & found.keys()):
    if f'data.{key}.'.startswith(free):
      continue
    old, new = before[key], found[key]
    for name in sorted(old.keys() | new.keys()):
      if old.get(name) != new.get(name):
        how = 'is gone' if name not in new else 'has changed'
        raise ValueError(
          f'{name!r} of config.data.{key} '
          f'{how if name in old else "is new"} since the run in {workdir!r} '
          'read it; put it back as it was, choose another --workdir, or allow '
          f'it with --may_differ=data.{key}'
        )


def _begun(workdir: str, file: str) -> bool:
  """Whether a checkpoint is there to go on from, and the file."""
  checkpoints = os.path.join(workdir, 'checkpoints')
  if not os.path.isdir(checkpoints) or not any(
    name.isdigit() for name in os.listdir(checkpoints)
  ):
    return False
  return os.path.exists(os.path.join(workdir, file))


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run, or its base alone.

  Attributes:
    config: the run's.
    model, variables: what computes; for the base alone without an adapter.
    words: the vocabulary.
    step: of the checkpoint; 0 for the base.
    method: canonical text, 'none' for the base.
    base: the base's name: the last part of its path, 'random' without one.
    base_parameters, parameters: of the base, and trained.
    folder: where the base was read, '' for random weights.
  """

  config: ConfigDict
  model: Any
  variables: Tree
  words: Tokenizer
  step: int
  method: str
  base: str
  base_parameters: int
  parameters: int
  folder: str = ''

  @property
  def ends(self) -> tuple[int, ...]:
    """Ids that end an answer."""
    own, path = self.config.data.vocabulary, self.config.model.path
    folder = self.folder if own in ('', path) else os.path.expanduser(own)
    return prompts.ends(self.words, folder)


def open_run(workdir: str, which: str = ''):
  """(config, model, variables, vocabulary, step) of `load`."""
  run = load(workdir, which)
  return run.config, run.model, run.variables, run.words, run.step


def load(workdir: str, which: str = '') -> Run:
  """Reads a run.

  Args:
    which: 'base' for its base without what was trained, else a checkpoint;
      see `Checkpoints.restore_trainable`.

  Raises:
    ValueError: no run is there, its base has changed since, or its chat
      template is gone.
  """
  config = run_config.load(workdir)
  # A pass over many shapes is mostly compiling, which unrolled layers lengthen.
  config.model.unroll = 1
  base = base_lib.load(config.model)
  if which == 'base':
    model, variables = _alone(base, config)
    step, method, parameters = 0, 'none', 0
  else:
    model, built = base_lib.module(base, config)
    variables, step = _trained(base, built, config, workdir, which)
    method, parameters = built.method, _size(variables[built.trainable])
  words = load_tokenizer(config.data.vocabulary, config.model.path)
  chat_template.set_chat_template(
    words, config.data.chat_template, config.data.system
  )
  return Run(
    config,
    model,
    jax.tree.map(jnp.asarray, variables),
    words,
    step,
    method,
    os.path.basename(base.path.rstrip('/')).split(':')[-1] or 'random',
    quantize.parameters(variables['params'], base.config),
    parameters,
    base.folder,
  )


def open_model(path: str, adapter: str = '') -> Run:
  """A base by its path, as it is or with an adapter from another path.

  Raises:
    ValueError: no model is there, no adapter, or it is another base's; or
      the model has no decoder.
  """
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  if adapter:
    found = base_lib.load_adapter(adapter, base_lib.shape(config.model)[1])
    config.method = found.method
    config.semantics = found.semantics or config.semantics
    config.model.quantise = found.quantise or ''
  base = base_lib.load(config.model)
  check_decodes(base.config)
  model, built = base_lib.module(base, config)
  variables = base_lib.initialise(base, model, config.seed)
  if adapter:
    variables = base_lib.with_adapter(variables, built, adapter, base)
  return Run(
    config,
    model,
    jax.tree.map(jnp.asarray, variables),
    load_tokenizer('', path),
    0,
    built.method if adapter else 'none',
    os.path.basename(path.rstrip('/')).split(':')[-1],
    quantize.parameters(variables['params'], base.config),
    _size(variables[built.trainable]) if adapter else 0,
    base.folder,
  )


def _alone(base: base_lib.Base, config: ConfigDict) -> tuple[Any, Tree]:
  """(model, variables) of a base: of random weights, those of the seed."""
  plain = config.copy_and_resolve_references()
  plain.method = 'full'
  model, _ = base_lib.module(base, plain)
  return model, base_lib.initialise(base, model, config.seed)


def _trained(
  base: base_lib.Base, built: Built, config: ConfigDict, workdir: str, which
) -> tuple[Tree, int]:
  """(variables, step) of a checkpoint."""
  trained, found = restore_trained(workdir, which)
  now = card(base, built, config.seed)
  if found['base']['sha256'] != now['base']['sha256']:
    raise ValueError(
      f'the base {base.path!r} is not the one that {workdir!r} was trained on '
      '(its content hash differs); put the old one back'
    )
  variables = {'params': base.params, 'peft': {}} | {built.trainable: trained}
  return variables, found['step']


def _size(tree: Tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
