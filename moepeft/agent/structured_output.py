# SPDX-License-Identifier: Apache-2.0
"""Structured answers: a pydantic model in, an instance of it out."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from moepeft.agent.chat_model import ChatModel, Message
from moepeft.agent.loop import EventSink, ignore_event
from moepeft.agent.tools import strict_schema, validation_message

ModelType = TypeVar('Form', bound=pydantic.BaseModel)


def ask_structured(
  model: ChatModel,
  model_type: type[ModelType],
  messages: Sequence[Message],
  retries: int = 2,
  options: Mapping[str, Any] | None = None,
  on_event: EventSink = ignore_event,
) -> ModelType:
  """Asks for an instance of a pydantic model.

  Args:
    model: whose server knows `response_format` json_schema; one that does not
      hold to it is told what was wrong.
    model_type: the pydantic model.
    messages: the conversation, the last one the question.
    retries: times that it is asked again after an answer that does not fit.
    options: of each request: temperature, seed, max_tokens ...
    on_event: called with each request and reply.

  Raises:
    ValueError: no answer fits, or `form` has no strict schema.
    Failed: there is no reply.
  """
  name = model_type.__name__
  schema = {
    'name': name,
    'schema': strict_schema(model_type, name),
    'strict': True,
  }
  response = {'type': 'json_schema', 'json_schema': schema}
  conversation, fault = list(messages), ''
  for _ in range(retries + 1):
    request = {
      'messages': conversation,
      'response_format': response,
      **(options or {}),
    }
    on_event({'event': 'asked', 'request': request})
    reply = model(request, ignore_event, None)
    on_event({'event': 'replied', 'message': reply.message})
    try:
      return model_type.model_validate_json(reply.message['content'])
    except pydantic.ValidationError as e:
      fault = validation_message(e)
    correction = {
      'role': 'user',
      'content': f'That does not fit: {fault}. Again.',
    }
    conversation = [*conversation, reply.message, correction]
  raise ValueError(
    f'no answer in {retries + 1} fits {name}; the last one: {fault}'
  )
