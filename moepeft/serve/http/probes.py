# SPDX-License-Identifier: Apache-2.0
"""Whether the server lives and can answer, its counts, and its page."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.serve.http import metrics
from moepeft.serve.http.errors import ApiError, model_not_found, unavailable
from moepeft.serve.http.model_registry import OWNER
from moepeft.serve.http.service import Service


async def models(service: Service, request: Request) -> JSONResponse:
  del request
  return JSONResponse({'object': 'list', 'data': _cards(service)})


async def model(service: Service, request: Request) -> JSONResponse:
  name = request.path_params['name']
  cards = _cards(service)
  for card in cards:
    if card['id'] == name:
      return JSONResponse(card)
  raise model_not_found(name, [card['id'] for card in cards])


def _cards(service: Service) -> list[dict[str, Any]]:
  cards = service.models.cards()
  if service.embedder is not None:
    cards.append(
      {
        'id': service.embedder.name,
        'object': 'model',
        'created': cards[0]['created'],
        'owned_by': OWNER,
        # What a page goes by that offers models to talk to.
        'type': 'embedding',
        'parent': None,
      }
    )
  return cards


async def health(service: Service, request: Request) -> Response:
  """The process answers; it may still be starting."""
  del service, request
  return JSONResponse({'status': 'alive'})


async def ready(service: Service, request: Request) -> Response:
  """A generation has run, and the server is not going down."""
  del request
  if service.draining:
    raise unavailable('the server is going down', 10, 'draining')
  if not service.engine.ready:
    raise unavailable('the server is starting', 5, 'starting')
  return JSONResponse({'status': 'ready'})


async def counts(service: Service, request: Request) -> Response:
  del request
  text = await asyncio.to_thread(service.metrics.text)
  return Response(text, headers={'Content-Type': metrics.CONTENT})


async def page(service: Service, request: Request) -> Response:
  """The chat page, a file without secrets, which asks for a key itself."""
  chat_page = service.page
  if chat_page is None:
    raise ApiError(404, 'this server has no chat page', None, 'not_found')
  tag = chat_page.headers.get('ETag')
  if tag and request.headers.get('if-none-match') == tag:
    return Response(None, 304, headers={'ETag': tag})
  return Response(chat_page.body, headers=chat_page.headers)
