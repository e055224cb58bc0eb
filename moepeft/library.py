# SPDX-License-Identifier: Apache-2.0
"""The library behind `import moepeft`: load a model and use it, or train one.

  import moepeft

  model = moepeft.load('smollm2', adapter='workdirs/sft')
  answer = model.generate(['What is LoRA?'], routing=True)[0]
  answer.text, answer.experts

This module wraps functions of the commands.
"""

import dataclasses
import functools
import os
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moepeft import evaluate as evaluate_command
from moepeft.checkpoints import base as base_lib
from moepeft.config import command_line
from moepeft.inference import sampling
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import LogprobRequest, Request
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.loaded_model import LoadedModel, load_model, load_run
from moepeft.inference.sampling import Sampling
from moepeft.peft import merge as peft_merge
from moepeft.runs.run import Run


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer to one prompt.

  Attributes:
    text: the text without EOS tokens.
    token_ids: the tokens with EOS.
    finish_reason: 'stop' at an end token, 'length' at `max_new_tokens`.
    experts: for each token {site: weight of each expert, averaged over
      layers}; () without `routing` or without routers.
  """

  text: str
  token_ids: tuple[int, ...]
  finish_reason: str
  experts: tuple[Mapping[str, tuple[float, ...]], ...] = ()


class Model:
  """A model in memory, with or without an adapter.

  Attributes:
    loaded: the config, Flax module, variables and tokenizer.
  """

  def __init__(self, loaded: LoadedModel):
    self.loaded = loaded

  def __repr__(self) -> str:
    return f'Model({self.loaded.base!r}, method={self.method!r})'

  @property
  def method(self) -> str:
    """The adapter's method string; 'none' for a base."""
    return self.loaded.method

  def generate(
    self,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    routing: bool = False,
    task: str = '',
  ) -> list[Answer]:
    """Generates an answer to each prompt.

    Args:
      temperature: the sampling temperature; 0 for greedy decoding.
      top_p: sample from the fewest tokens with this total probability.
      seed: the sampling seed.
      chat: whether to apply the tokenizer's chat template.
      routing: whether to return the experts' weights of each token.
      task: the prompts' task, for an adapter that routes by the task.

    Raises:
      ValueError: a prompt and its answer are too long, or a value is invalid.
    """
    token_choice = Sampling(temperature=temperature or None, top_p=top_p)
    sampling.check(token_choice)
    encode = self.loaded.prompt_encoder(chat)
    requests = [
      Request(
        str(i),
        tuple(encode([prompt])),
        max_new_tokens,
        sampling=token_choice,
        seed=seed + i,
        eos_token_ids=self.loaded.eos_token_ids,
        routing=routing,
        task=task,
      )
      for i, prompt in enumerate(prompts)
    ]
    return [
      Answer(
        self._decode(completion.ids),
        tuple(completion.ids),
        completion.finished.reason,
        tuple(t.experts for t in completion.tokens if t.experts is not None),
      )
      for completion in self._engine.generate(requests)
    ]

  def log_probs(
    self, prompts: Sequence[str], answers: Sequence[str], task: str = ''
  ) -> list[np.ndarray]:
    """Log-probability of each token of each answer, EOS included, in nats.

    Args:
      task: the prompts' task, for an adapter that routes by the task.

    Raises:
      ValueError: a prompt and its answer are too long.
    """
    encode, tokenizer = self.loaded.prompt_encoder(), self.loaded.tokenizer
    requests = [
      LogprobRequest(
        tuple(encode([prompt])),
        (*tokenizer.encode(answer), tokenizer.eos),
        task=task,
      )
      for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return self._engine.log_probs(requests)

  def evaluate(
    self, data: str, metrics: Sequence[str] = (), max_examples: int = 100
  ) -> dict[str, Any]:
    """Evaluates the model on a file or directory of rows.

    Args:
      data: rows in the format of `python -m moepeft.evaluate --data`.
      metrics: names of metrics; by default those that the rows allow.
      max_examples: the maximum number of examples per prompt.

    Returns:
      The summary that the command writes.

    Raises:
      ValueError: there are no rows, or they are invalid.
    """
    summary, _ = evaluate_command.evaluate(
      self.loaded.workdir or self.loaded.base,
      data=data,
      metrics=metrics,
      max_examples=max_examples,
      loaded=self.loaded,
    )
    return summary

  def merge(self) -> 'Model':
    """Merges the adapter into the base's weights.

    Raises:
      ValueError: there is no adapter, or its function depends on the token, as
        in a routed mixture.
    """
    loaded = self.loaded
    if loaded.method == 'none':
      raise ValueError(f'{self} has no adapter; there is nothing to merge')
    config = loaded.config.copy_and_resolve_references()
    base = base_lib.Base(
      *base_lib.shape(config.model), None, config.model.path, ''
    )
    _, built = base_lib.module(base, config)
    params = peft_merge.merge(built, loaded.variables)
    config.method = 'full'
    model, _ = base_lib.module(base, config)
    return Model(
      dataclasses.replace(
        loaded,
        config=config,
        model=model,
        variables={'params': params, 'peft': {}},
        method='none',
        parameters=0,
      )
    )

  def _decode(self, token_ids: Sequence[int]) -> str:
    ends = self.loaded.eos_token_ids
    return self.loaded.tokenizer.decode([i for i in token_ids if i not in ends])

  @functools.cached_property
  def _engine(self) -> Engine:
    """The engine, which compiles programs at their first use."""
    model, variables = self.loaded.model, self.loaded.variables
    adapter = FixedAdapter(model, variables.get('peft') or None)
    config = EngineConfig(routing=True, compile_ahead=False)
    return Engine(model, variables['params'], adapter, config)


def load(model: str, adapter: str = '', checkpoint: str = '') -> Model:
  """Loads a model.

  Args:
    model: the work directory of a run, for its base with its adapter; or a
      base: a directory of Hugging Face or T5X, a GGUF file, a name on the hub,
      'package:t5_tiny' or 'smollm2'.
    adapter: an adapter of a base: the work directory of a run, or an export.
    checkpoint: a checkpoint of a run: 'best', 'base' or a step; default: the
      latest.

  Raises:
    ValueError: there is no model or adapter, or they do not belong together.

  >>> import moepeft
  >>> moepeft.load('package:t5_tiny').method
  'none'
  """
  model = os.path.expanduser(model)
  if not Run(model).has_checkpoints_dir:
    if checkpoint:
      raise ValueError(
        f'checkpoint={checkpoint!r} is for runs, but {model!r} is not a run; '
        'leave it out'
      )
    return Model(load_model(model, adapter))
  if adapter:
    raise ValueError(
      f'{model!r} is a run, which has its own adapter; load its base '
      f'with adapter={adapter!r}'
    )
  return Model(load_run(model, checkpoint))


def load_config(path: str) -> ConfigDict:
  """Loads the config of a file, 'configs/molora_t5.py:experts=4,rank=2'.

  Raises:
    ValueError: the file does not exist, or has no such value.

  >>> import moepeft
  >>> moepeft.load_config('configs/molora_t5.py:experts=4,rank=2').method
  'molora(experts=4, rank=2)'
  """
  file, _, values = command_line.find_config(
    os.path.expanduser(path)
  ).partition(':')
  if not os.path.isfile(file):
    raise ValueError(f'there is no config {file!r}')
  return runpy.run_path(file)['get_config'](values)
