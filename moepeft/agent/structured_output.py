# SPDX-License-Identifier: Apache-2.0
"""Structured answers: a pydantic model in, an instance of it out."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from moepeft.agent.chat_model import Message, ChatModel
from moepeft.agent.loop import EventSink, ignore_event
from moepeft.agent.tools import validation_message, strict_schema

ModelType = TypeVar('Form', bound=pydantic.BaseModel)


def ask_structured(
  model: ChatModel,
  form: type[ModelType],
  messages: Sequence[Message],
  retries: int = 2,
  options: Mapping[str, Any] | None = None,
  tell: EventSink = ignore_event,
) -> ModelType:
  """Asks for an instance of a pydantic model.

  Args:
    model: whose server knows `response_format` json_schema; one that does not
      hold to it is told what was wrong.
    form: what is asked for.
    messages: the conversation, the last one the question.
    retries: times that it is asked again after an answer that does not fit.
    options: of each request: temperature, seed, max_tokens ...
    tell: is told the requests and replies.

  Raises:
    ValueError: no answer fits, or `form` has no strict schema.
    Failed: there is no reply.
  """
  name = form.__name__
  schema = {'name': name, 'schema': strict_schema(form, name), 'strict': True}
  response = {'type': 'json_schema', 'json_schema': schema}
  said, wrong = list(messages), ''
  for _ in range(retries + 1):
    request = {'messages': said, 'response_format': response, **(options or {})}
    tell({'event': 'asked', 'request': request})
    reply = model(request, ignore_event, None)
    tell({'event': 'replied', 'message': reply.message})
    try:
      return form.model_validate_json(reply.message['content'])
    except pydantic.ValidationError as e:
      wrong = validation_message(e)
    again = {'role': 'user', 'content': f'That does not fit: {wrong}. Again.'}
    said = [*said, reply.message, again]
  raise ValueError(
    f'no answer in {retries + 1} fits {name}; the last one: {wrong}'
  )
