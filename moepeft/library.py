# SPDX-License-Identifier: Apache-2.0
"""The library behind `import moepeft`: load a model and use it, or train one.

  import moepeft

  model = moepeft.load('smollm2', adapter='workdirs/sft')
  answer = model.generate(['What is LoRA?'], routing=True)[0]
  answer.text, answer.experts

It is a thin layer over the functions that the commands use.
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
    text: without the tokens that end it.
    token_ids: its tokens, the end included.
    finish_reason: 'stop' at an end token, 'length' at `max_new_tokens`.
    experts: for each token {site: weight of each expert, averaged over
      layers}; () where `routing` was not asked for or nothing routes.
  """

  text: str
  token_ids: tuple[int, ...]
  finish_reason: str
  experts: tuple[Mapping[str, tuple[float, ...]], ...] = ()


class Model:
  """A model in memory, with its adapter or without one.

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
  ) -> list[Answer]:
    """Answers prompts.

    Args:
      temperature: 0 is greedy.
      top_p: the fewest tokens whose probabilities sum to it are kept.
      seed: of the draws.
      chat: puts each prompt into the tokenizer's chat template.
      routing: reports the experts' weights of each token.

    Raises:
      ValueError: a prompt and its answer are too long, or a number cannot be.
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
    self, prompts: Sequence[str], answers: Sequence[str]
  ) -> list[np.ndarray]:
    """Log-probability of each token of each answer, EOS included, in nats.

    Raises:
      ValueError: a prompt and its answer are too long.
    """
    encode, tokenizer = self.loaded.prompt_encoder(), self.loaded.tokenizer
    return self._engine.log_probs(
      [
        LogprobRequest(
          tuple(encode([prompt])), (*tokenizer.encode(answer), tokenizer.eos)
        )
        for prompt, answer in zip(prompts, answers, strict=True)
      ]
    )

  def evaluate(
    self, data: str, metrics: Sequence[str] = (), max_examples: int = 100
  ) -> dict[str, Any]:
    """Measures the model on a file of rows, or a directory of such files.

    Args:
      data: rows as `python -m moepeft.evaluate --data` takes them.
      metrics: names of metrics; those that the rows allow by default.
      max_examples: of a prompt.

    Returns:
      The summary that the command writes.

    Raises:
      ValueError: no rows are there, or not of the form they should be.
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
    """A model without adapter that computes the same.

    Raises:
      ValueError: there is no adapter, or its change depends on the token, as
        that of a routed mixture does.
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
    """Compiles each program when it is first needed."""
    model, variables = self.loaded.model, self.loaded.variables
    adapter = FixedAdapter(model, variables.get('peft') or None)
    config = EngineConfig(routing=True, compile_ahead=False)
    return Engine(model, variables['params'], adapter, config)


def load(model: str, adapter: str = '', checkpoint: str = '') -> Model:
  """Reads a model.

  Args:
    model: the work directory of a run, with its base and its adapter; or a
      base: a directory in Hugging Face's or T5X's form, a GGUF file, a name on
      the hub, 'package:t5_tiny', which ships, or 'smollm2'.
    adapter: of a base: the work directory of a run, or an exported adapter.
    checkpoint: of a run: 'best', 'base' or a step; the latest by default.

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
        f'checkpoint={checkpoint!r} is of a run, and {model!r} is none; leave '
        'it out'
      )
    return Model(load_model(model, adapter))
  if adapter:
    raise ValueError(
      f'{model!r} is a run, which has an adapter of its own; load its base '
      f'with adapter={adapter!r}'
    )
  return Model(load_run(model, checkpoint))


def load_config(path: str) -> ConfigDict:
  """The config of a file, 'configs/molora_t5.py:experts=4,rank=2'.

  Raises:
    ValueError: there is no such file, or it takes no such value.

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
