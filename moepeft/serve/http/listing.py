# SPDX-License-Identifier: Apache-2.0
"""GET /v1/models and /v1/models/NAME."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.serve.http.errors import no_model
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
  raise no_model(name, [card['id'] for card in cards])


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
