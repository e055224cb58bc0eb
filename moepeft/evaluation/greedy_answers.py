# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to the inputs of many examples.

Inputs are encoded and truncated as in training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moepeft.core.types import Tree
from moepeft.data.batching import decoder_only, seq2seq
from moepeft.data.batching.packing import length_after_prefix
from moepeft.data.batching.router_inputs import RouterInputs
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.inference.adapters.served_modules import request_tasks
from moepeft.inference.api import RouterFields
from moepeft.inference.generator import GenerationConfig, Generator
from moepeft.inference.length_check import check_length
from moepeft.inference.prompts import encode_example_prompt
from moepeft.peft.prefix import model_prefix_ids
from moepeft.tasks import Example


class BatchGenerator:
  """Generates greedy answers in batches."""

  def __init__(
    self,
    model: Any,
    tokenizer: Tokenizer,
    inputs_length: int,
    max_new_tokens: int,
    batch_size: int,
    eos_token_ids: Sequence[int] = (),
  ):
    """
    Args:
      inputs_length: maximum tokens of the inputs, a soft prompt included.
      max_new_tokens: maximum tokens of an answer, EOS included.
      batch_size: answers that a device generates at once.
      eos_token_ids: ids that end an answer; by default the tokenizer's EOS.

    Raises:
      ValueError: `max_new_tokens` is below 1, or the inputs and the answer
        exceed a decoder's maximum length.
    """
    self._model, self._tokenizer = model, tokenizer
    self._decoder_only, self._batch_size = hasattr(model, 'extend'), batch_size
    if self._decoder_only:
      # Checked for the longest inputs, before anything runs.
      max_length = model.config.length
      check_length(inputs_length, max_new_tokens, max_length, decoder_only=True)
    prefix_ids = model_prefix_ids(model)
    self._max_inputs = length_after_prefix(
      inputs_length, prefix_ids, 'the inputs'
    )
    self._config = GenerationConfig(
      max_new_tokens, tuple(eos_token_ids) or (tokenizer.eos,)
    )
    self._generator: Generator | None = None

  def cut(self, examples: Sequence[Example]) -> np.ndarray:
    """Whether each example's inputs are truncated: bool [n]."""
    return np.array([self._encode(e.inputs)[1] for e in examples], bool)

  def answers(
    self,
    variables: Tree,
    examples: Sequence[Example],
    progress: Callable[[int], None] = lambda answers: None,
  ) -> list[str]:
    """The most probable continuation of each example's inputs, as text.

    Args:
      progress: called after each batch with its number of examples.
    """
    adapter_map = self._model.adapter_map
    reads_task = bool(request_tasks(adapter_map))
    inputs = RouterInputs.of_method(adapter_map)
    fields = []
    for example in examples:
      _, embedding = inputs.of_example(example)
      fields.append(
        RouterFields(
          example.task if reads_task else '',
          () if embedding is None else tuple(map(float, embedding)),
        )
      )
    texts = [example.inputs for example in examples]
    return self.texts(variables, texts, progress, fields)

  def texts(
    self,
    variables: Tree,
    inputs: Sequence[str],
    progress: Callable[[int], None] = lambda answers: None,
    router_fields: Sequence[RouterFields] | None = None,
  ) -> list[str]:
    """The most probable continuation of each input, as text.

    Args:
      router_fields: of each input, for routers that read them.
    """
    ids = [self._encode(text)[0] for text in inputs]
    if self._generator is None:
      self._generator = Generator(
        self._model, variables, self._tokenizer, self._config, self._batch_size
      )
    self._generator.update_weights(variables)
    return self._generator.generate_texts(ids, None, progress, router_fields)

  def _encode(self, text: str) -> tuple[list[int], bool]:
    """(ids of an input, whether it was truncated)."""
    if not self._decoder_only:
      return seq2seq.encode_truncated(self._tokenizer, text, self._max_inputs)
    ids = encode_example_prompt(self._tokenizer, text, decoder_only=True)
    # A decoder continues the prompt's end, so its beginning is cut.
    last_ids = decoder_only.keep_last(
      ids, self._max_inputs, self._tokenizer.bos
    )
    return list(last_ids), len(ids) > self._max_inputs
