# SPDX-License-Identifier: Apache-2.0
"""Reads a customer's message: its intent and the values of slots.

Values with a pattern are read by it, so none is invented. The intent, and
values that are a choice, are those of the nearest example phrases, or those
that a chat model chooses under a JSON schema.
"""

from typing import Literal

import pydantic

from examples.customer_service.dialogue import (
  MESSAGES,
  REQUESTS,
  Understanding,
  pattern_slots,
)
from examples.knowledge_base.classify import ExampleClassifier
from examples.knowledge_base.search import Embedder
from moepeft.agent.chat_markers import escape_markers
from moepeft.agent.chat_model import ChatModel
from moepeft.agent.structured_output import ask_structured

_CHOICES = {
  name: slot.choices
  for request in REQUESTS.values()
  for name, slot in request.slots.items()
  if slot.choices
}
_INTENTS = {name: r.examples for name, r in REQUESTS.items()} | MESSAGES


class ByExamples:
  """Reads messages by their nearest examples."""

  def __init__(self, embed: Embedder, threshold: float = 0.35):
    """`threshold`: the least cosine of an intent's nearest example."""
    self._intent = ExampleClassifier(embed, _INTENTS, k=3)
    self._choices = {
      name: ExampleClassifier(embed, choices, k=1)
      for name, choices in _CHOICES.items()
    }
    self._threshold = threshold

  def __call__(self, message: str, slot: str) -> Understanding:
    """The content of a message, in which `slot` was asked for, or ''."""
    slots = pattern_slots(message)
    intent, cosine = self._intent(message)
    if cosine < self._threshold:
      intent = ''
    for name, classify in self._choices.items():
      value, cosine = classify(message)
      # A choice counts where it was asked for or is clearly meant.
      if cosine >= (self._threshold if name == slot else 0.6):
        slots[name] = value
    return Understanding(intent, slots)


class ByModel:
  """Reads messages by a chat model and a schema."""

  def __init__(self, model: ChatModel):
    self._model = model
    fields = {
      name: (Literal[('', *choices)], ...) for name, choices in _CHOICES.items()
    }
    self._type = pydantic.create_model(
      'Message', intent=(Literal[('', *_INTENTS)], ...), **fields
    )
    lines = [f'{name}: {texts[0]}' for name, texts in _INTENTS.items()]
    self._system = (
      "Classify the intent of a shop customer's message as one of these, with "
      'an example each, or leave it empty:\n' + '\n'.join(lines)
    )

  def __call__(self, message: str, slot: str) -> Understanding:
    content = ask_structured(
      self._model,
      self._type,
      [
        {'role': 'system', 'content': self._system},
        {'role': 'user', 'content': escape_markers(message)},
      ],
      1,
      {'temperature': 0, 'max_tokens': 60},
    )
    values = content.model_dump()
    intent = values.pop('intent')
    choices = {name: value for name, value in values.items() if value}
    return Understanding(intent, pattern_slots(message) | choices)
