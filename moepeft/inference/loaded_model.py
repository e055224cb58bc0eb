# SPDX-License-Identifier: Apache-2.0
"""A trained run or a base model in memory, ready to evaluate or generate."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.checkpoints.restore import restore_trained
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.config import defaults as config_lib
from moepeft.core.types import Tree
from moepeft.data import load_tokenizer
from moepeft.data.chat import template as chat_template
from moepeft.data.readers import READERS
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference import prompts
from moepeft.models import check_decodes, decoder_only
from moepeft.moe import router_state
from moepeft.peft import Built
from moepeft.runs.run import Run


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A trained run, a base model alone, or one with an adapter.

  Attributes:
    config: the run's, or the defaults.
    model, variables: the Flax module and its parameters; of the base alone
      without an adapter.
    tokenizer: the one that the model was trained with.
    step: of the checkpoint; 0 for the base.
    method: canonical text, 'none' for the base.
    base: the base's name: the last part of its path, 'random' without one.
    base_parameters, parameters: of the base, and trained.
    base_folder: where the base was read, '' for random weights.
    workdir: of a run; '' for a base, with an adapter or alone.
  """

  config: ConfigDict
  model: Any
  variables: Tree
  tokenizer: Tokenizer
  step: int
  method: str
  base: str
  base_parameters: int
  parameters: int
  base_folder: str = ''
  workdir: str = ''

  @property
  def eos_token_ids(self) -> tuple[int, ...]:
    """Ids that end an answer."""
    tokenizer, path = self.config.data.tokenizer, self.config.model.path
    folder = self.base_folder
    if tokenizer not in ('', path):
      folder = os.path.expanduser(tokenizer)
    return prompts.eos_token_ids(self.tokenizer, folder)

  def prompt_encoder(
    self, chat: bool = False, system: str = ''
  ) -> Callable[[Sequence[str]], list[int]]:
    """Encodes the turns of a conversation, as the run was trained to read them.

    Args:
      chat: whether turns are put into the chat template; else the last turn is
        the prompt.
      system: of the template, instead of config.data.system_prompt.

    Raises:
      ValueError: `chat`, where there is no template. The result raises one
        where an id is beyond the model's embedding.
    """
    data, tokenizer = self.config.data, self.tokenizer
    causal, vocab = decoder_only(self.model), self.model.config.vocab
    template = prompts.template(tokenizer, data, system) if chat else None
    # A model that was not trained here continues the text as it is.
    as_example = self.workdir and READERS[data.source].has_separator
    encode = (
      prompts.encode_example_prompt if as_example else prompts.encode_text
    )

    def encode_turns(turns: Sequence[str]) -> list[int]:
      if template:
        ids = template.encode_prompt(prompts.conversation(turns))
      else:
        ids = encode(tokenizer, turns[-1], causal)
      prompts.check_ids(ids, vocab)
      return ids

    return encode_turns


def open_run(workdir: str, checkpoint: str = ''):
  """(config, model, variables, tokenizer, step) of `load_run`."""
  run = load_run(workdir, checkpoint)
  return run.config, run.model, run.variables, run.tokenizer, run.step


def load_run(workdir: str, checkpoint: str = '') -> LoadedModel:
  """Reads a run.

  Args:
    checkpoint: 'base' for its base without an adapter, else a checkpoint; see
      `Checkpoints.restore_trainable`.

  Raises:
    ValueError: no run is there, its base has changed since, or its chat
      template is gone.
  """
  config = Run(workdir).load_config()
  # A pass over many shapes is mostly compiling, which unrolled layers lengthen.
  config.model.scan_unroll = 1
  base = base_lib.load(config.model)
  if checkpoint == 'base':
    model, variables = _base_alone(base, config)
    step, method, parameters = 0, 'none', 0
  else:
    model, built = base_lib.module(base, config)
    variables, step = _trained(base, built, config, workdir, checkpoint)
    method, parameters = built.method, _size(variables[built.trainable], built)
  tokenizer = load_tokenizer(config.data.tokenizer, config.model.path)
  chat_template.set_chat_template(
    tokenizer, config.data.chat_template, config.data.system_prompt
  )
  return LoadedModel(
    config,
    model,
    jax.tree.map(jnp.asarray, variables),
    tokenizer,
    step,
    method,
    _base_name(base.path) or 'random',
    quantize.parameters(variables['params'], base.config),
    parameters,
    base.folder,
    workdir,
  )


def load_model(path: str, adapter: str = '') -> LoadedModel:
  """A base by its path, as it is or with an adapter from another path.

  Raises:
    ValueError: no model is there, no adapter, or it is another base's; or
      the model has no decoder.
  """
  config = config_lib.default()
  config.model.path, config.method = path, 'full'
  if adapter:
    start = base_lib.load_adapter(adapter, base_lib.shape(config.model)[1])
    config.method = start.method
    config.semantics = start.semantics or config.semantics
    config.model.quantize = start.quantise or ''
  base = base_lib.load(config.model)
  check_decodes(base.config)
  model, built = base_lib.module(base, config)
  variables = base_lib.initialise(base, model, config.seed)
  if adapter:
    variables = base_lib.with_adapter(variables, built, adapter, base)
  return LoadedModel(
    config,
    model,
    jax.tree.map(jnp.asarray, variables),
    load_tokenizer('', path),
    0,
    built.method if adapter else 'none',
    _base_name(path),
    quantize.parameters(variables['params'], base.config),
    _size(variables[built.trainable], built) if adapter else 0,
    base.folder,
  )


def _base_alone(base: base_lib.Base, config: ConfigDict) -> tuple[Any, Tree]:
  """(model, variables) of a base: of random weights, those of the seed."""
  config = config.copy_and_resolve_references()
  config.method = 'full'
  model, _ = base_lib.module(base, config)
  return model, base_lib.initialise(base, model, config.seed)


def _trained(
  base: base_lib.Base,
  built: Built,
  config: ConfigDict,
  workdir: str,
  checkpoint: str,
) -> tuple[Tree, int]:
  """(variables, step) of a checkpoint."""
  trained, saved = restore_trained(workdir, checkpoint)
  now = describe_run(base, built, config.seed)
  if saved['base']['sha256'] != now['base']['sha256']:
    raise ValueError(
      f'the base {base.path!r} is not the one that {workdir!r} was trained on '
      '(its content hash differs); put the old one back'
    )
  variables = {'params': base.params, 'peft': {}} | {built.trainable: trained}
  return variables, saved['step']


def _base_name(path: str) -> str:
  return os.path.basename(path.rstrip('/')).split(':')[-1]


def _size(tree: Tree, built: Built) -> int:
  trained, _ = router_state.split(tree, built.frozen_mixtures)
  return sum(leaf.size for leaf in jax.tree.leaves(trained))
