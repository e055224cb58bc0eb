# SPDX-License-Identifier: Apache-2.0
"""Structured answers: instances of a pydantic model."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from moepeft.agent.chat_model import ChatModel, Message
from moepeft.agent.loop import EventSink, ignore_event
from moepeft.agent.tools import strict_schema, validation_message

ModelType = TypeVar('ModelType', bound=pydantic.BaseModel)


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
    model: a chat model whose server supports `response_format` json_schema. If
      it ignores the schema, a correction is requested.
    model_type: the pydantic model.
    messages: the conversation, which ends with the question.
    retries: the number of further requests after an invalid answer.
    options: options of each request: temperature, seed, max_tokens, ...
    on_event: called with each request and reply.

  Raises:
    ValueError: no answer is valid, or `model_type` has no strict schema.
    ReplyError: there is no reply.
  """
  name = model_type.__name__
  schema = {
    'name': name,
    'schema': strict_schema(model_type, name),
    'strict': True,
  }
  response = {'type': 'json_schema', 'json_schema': schema}
  conversation, problem = list(messages), ''
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
      problem = validation_message(e)
    correction = {
      'role': 'user',
      'content': f'That does not fit: {problem}. Again.',
    }
    conversation = [*conversation, reply.message, correction]
  raise ValueError(
    f'no answer in {retries + 1} fits {name}; the last one: {problem}'
  )
