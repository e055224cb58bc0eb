# SPDX-License-Identifier: Apache-2.0
"""Loads a trained run or a base model for evaluation and generation."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints import quantize
from moepeft.checkpoints.count_parameters import count_trained
from moepeft.checkpoints.restore import restore_trained
from moepeft.checkpoints.run_metadata import describe_run
from moepeft.config import defaults as config_lib
from moepeft.core.types import Tree
from moepeft.data import load_tokenizer
from moepeft.data.chat import template as chat_template
from moepeft.data.readers import READERS
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference import prompts
from moepeft.inference.engine.draft_model import Draft
from moepeft.inference.token_bytes import TokenBytes
from moepeft.models import check_decodes, decoder_only
from moepeft.peft import Built
from moepeft.runs.run import Run


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A trained run, a base model alone, or one with an adapter.

  Attributes:
    config: the config of the run, or the default config.
    model: the Flax module, with the adapter if there is one.
    variables: the Flax collections 'params' and 'peft'.
    tokenizer: the tokenizer that the model was trained with.
    step: the training step of the checkpoint; 0 for a base.
    method: the canonical method string; 'none' for a base.
    base: the last part of the base's path; 'random' for random weights.
    base_parameters, parameters: the numbers of base and of trained parameters.
    base_folder: the directory of the base; '' for random weights.
    workdir: the work directory of a run; '' for a base or an exported adapter.
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
    """Returns a function that encodes the turns of a conversation.

    Args:
      chat: whether to use the chat template; otherwise the last turn alone is
        the prompt, encoded as in training.
      system: a system prompt that replaces config.data.system_prompt.

    Raises:
      ValueError: `chat` is set, and there is no chat template. The function
        raises it if an id is beyond the model's embedding.
    """
    data, tokenizer = self.config.data, self.tokenizer
    causal, vocab = decoder_only(self.model), self.model.config.vocab
    template = (
      prompts.load_chat_template(tokenizer, data, system) if chat else None
    )
    # Only runs of this package were trained on examples with a separator.
    as_example = self.workdir and READERS[data.source].has_separator
    encode = (
      prompts.encode_example_prompt if as_example else prompts.encode_text
    )

    def encode_turns(turns: Sequence[str]) -> list[int]:
      if template:
        ids = template.encode_prompt(prompts.to_conversation(turns))
      else:
        ids = encode(tokenizer, turns[-1], causal)
      prompts.check_ids(ids, vocab)
      return ids

    return encode_turns


def open_run(workdir: str, checkpoint: str = ''):
  """Reads a run as (config, model, variables, tokenizer, step)."""
  run = load_run(workdir, checkpoint)
  return run.config, run.model, run.variables, run.tokenizer, run.step


def load_run(workdir: str, checkpoint: str = '') -> LoadedModel:
  """Reads a run.

  Args:
    checkpoint: a checkpoint, see `Checkpoints.restore_trainable`; or 'base' for
      the run's base without the adapter.

  Raises:
    ValueError: the directory is not a run, its base has changed since the
      training, or its chat template is missing.
  """
  config = Run(workdir).load_config()
  # Evaluation compiles many shapes, and unrolled layers compile slowly.
  config.model.scan_unroll = 1
  base = base_lib.load(config.model)
  if checkpoint == 'base':
    model, variables = _base_without_adapter(base, config)
    step, method, parameters = 0, 'none', 0
  else:
    model, built = base_lib.module(base, config)
    variables, step = _restore_run(base, built, config, workdir, checkpoint)
    method, parameters = (
      built.method,
      _count_trained(variables, model, built, base),
    )
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
  """Reads a base model, with an adapter if `adapter` is a path.

  Raises:
    ValueError: the model or the adapter cannot be read, the adapter belongs to
      another base, or the model has no decoder.
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
    _count_trained(variables, model, built, base) if adapter else 0,
    base.folder,
  )


def load_draft(path: str, tokenizer: Tokenizer) -> Draft:
  """Reads a draft model for a model with the given tokenizer.

  Raises:
    ValueError: the model cannot be read, is not decoder-only, or its tokenizer
      has other tokens.
  """
  loaded = load_model(path)
  if not decoder_only(loaded.model):
    raise ValueError(
      f'--assistant_model={path!r} is an encoder-decoder; name a decoder-only '
      'model'
    )
  size = max(tokenizer.size, loaded.tokenizer.size)
  tables = [TokenBytes(t) for t in (tokenizer, loaded.tokenizer)]
  if any(tables[0][i] != tables[1][i] for i in range(size)):
    raise ValueError(
      f'the tokens of --assistant_model={path!r} are not those of the model; '
      'name a smaller model of the same family'
    )
  return Draft(loaded.model, loaded.variables['params'])


def _base_without_adapter(
  base: base_lib.Base, config: ConfigDict
) -> tuple[Any, Tree]:
  """Returns (model, variables) of a base; random weights use the seed."""
  config = config.copy_and_resolve_references()
  config.method = 'full'
  model, _ = base_lib.module(base, config)
  return model, base_lib.initialise(base, model, config.seed)


def _restore_run(
  base: base_lib.Base,
  built: Built,
  config: ConfigDict,
  workdir: str,
  checkpoint: str,
) -> tuple[Tree, int]:
  """Returns (variables, step) of a checkpoint."""
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


def _count_trained(
  variables: Tree, model: Any, built: Built, base: base_lib.Base
) -> int:
  padded = base_lib.padded_axes(model, base)
  return count_trained(variables[built.trainable], built, padded)[0]
