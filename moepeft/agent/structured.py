# SPDX-License-Identifier: Apache-2.0
"""Structured answers: a pydantic model in, an instance of it out."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from moepeft.agent import events
from moepeft.agent.events import Tell, ignore
from moepeft.agent.model import Model
from moepeft.agent.schemas import strict, without_nulls
from moepeft.agent.tools import reasons

Form = TypeVar('Form', bound=pydantic.BaseModel)


def fill(
  model: Model,
  form: type[Form],
  messages: Sequence[Mapping[str, Any]],
  retries: int = 2,
  options: Mapping[str, Any] | None = None,
  seconds: float | None = None,
  tell: Tell = ignore,
) -> Form:
  """Asks for an instance of a pydantic model.

  Args:
    model: whose server knows `response_format` json_schema; one that does not
      hold to it is told what was wrong.
    form: what is asked for.
    messages: the conversation, the last one the question.
    retries: times that it is asked again after an answer that does not fit.
    options: of each request: temperature, seed, max_tokens ...
    seconds: that a reply may take.
    tell: is told the requests and replies.

  Raises:
    ValueError: no answer fits, or `form` has no strict schema.
    Failed: there is no reply.
  """
  loose = form.model_json_schema()
  schema = {
    'name': form.__name__,
    'schema': strict(loose, form.__name__),
    'strict': True,
  }
  said = list(messages)
  for _ in range(retries + 1):
    request = {
      'messages': said,
      'response_format': {'type': 'json_schema', 'json_schema': schema},
      **(options or {}),
    }
    tell(events.Asked(request, 0.0))
    reply = model(request, lambda text: tell(events.Piece(text)), seconds)
    tell(events.Replied(reply))
    made, wrong = _read(form, loose, reply.text)
    if made is not None:
      return made
    said = [
      *said,
      {'role': 'assistant', 'content': reply.text},
      {'role': 'user', 'content': f'That does not fit: {wrong}. Answer anew.'},
    ]
  raise ValueError(
    f'no answer in {retries + 1} fits {form.__name__}; the last one: {wrong}'
  )


def _read(
  form: type[Form], loose: Mapping[str, Any], text: str
) -> tuple[Form | None, str]:
  try:
    value = pydantic.TypeAdapter(Any).validate_json(text)
    value = without_nulls(value, loose, loose.get('$defs', {}))
    return form.model_validate(value), ''
  except pydantic.ValidationError as e:
    return None, reasons(e)
