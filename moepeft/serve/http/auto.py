# SPDX-License-Identifier: Apache-2.0
"""model='auto': the adapter that a request goes to is chosen by its content."""

from collections.abc import Callable, Sequence

from starlette.requests import Request

from moepeft.serve.embeddings.chooser import AdapterChoice
from moepeft.serve.http.embeddings import run_encoder
from moepeft.serve.http.model_registry import RegisteredModel
from moepeft.serve.http.schemas import Message
from moepeft.serve.http.service import AUTO, Service


async def find_model(
  service: Service,
  request: Request,
  name: str,
  texts: Callable[[], Sequence[str]],
) -> tuple[RegisteredModel, AdapterChoice | None]:
  """(the model of a request, how it was chosen; None if the request names it).

  Args:
    name: the request's model.
    texts: returns what the request asks.

  Raises:
    ApiError: no model has this name, or too many texts wait to be embedded.
  """
  if service.chooser is None or name != AUTO:
    return service.find(name), None
  chooser, loaded = service.chooser, service.models.names()
  choice = await run_encoder(
    service, request, lambda: chooser.choose(texts(), loaded)
  )
  return service.find(choice.adapter or service.models.base), choice


def user_text(messages: Sequence[Message]) -> str:
  """The user's turns, the last one first: the encoder may cut the text."""
  turns = [message.text for message in messages if message.role == 'user']
  return '\n'.join(reversed(turns))
