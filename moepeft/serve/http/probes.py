# SPDX-License-Identifier: Apache-2.0
"""GET routes: models, health, readiness, metrics and the chat page."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.serve.http import metrics
from moepeft.serve.http.errors import ApiError, model_not_found, unavailable
from moepeft.serve.http.model_registry import OWNER
from moepeft.serve.http.service import AUTO, Service


async def models(service: Service, request: Request) -> JSONResponse:
  """The base, its adapters and the model for embeddings."""
  del request
  return JSONResponse({'object': 'list', 'data': _model_objects(service)})


async def model(service: Service, request: Request) -> JSONResponse:
  """One of the models."""
  name = request.path_params['name']
  objects = _model_objects(service)
  for model_object in objects:
    if model_object['id'] == name:
      return JSONResponse(model_object)
  raise model_not_found(name, [model_object['id'] for model_object in objects])


def _model_objects(service: Service) -> list[dict[str, Any]]:
  objects = service.models.model_objects()
  if service.embedder is not None:
    objects.append(
      {
        'id': service.embedder.name,
        'object': 'model',
        'created': objects[0]['created'],
        'owned_by': OWNER,
        # The chat page lists only models of the type 'language'.
        'type': 'embedding',
        'parent': None,
      }
    )
  if service.chooser is not None:
    chooses = [m for m in objects if m['id'] in service.chooser.names()]
    objects.append(
      {
        'id': AUTO,
        'object': 'model',
        'created': objects[0]['created'],
        'owned_by': OWNER,
        'type': 'language',
        'parent': service.models.base,
        'routing': any(m.get('routing') for m in chooses),
        # The adapters that a request may go to.
        'chooses': [m['id'] for m in chooses],
      }
    )
  return objects


async def health(service: Service, request: Request) -> Response:
  """Reports that the process is alive; it may still be starting."""
  del service, request
  return JSONResponse({'status': 'alive'})


async def ready(service: Service, request: Request) -> Response:
  """Reports whether the engine is ready and the server not shutting down."""
  del request
  if service.draining:
    raise unavailable('the server is shutting down', 10, 'draining')
  if not service.engine.ready:
    raise unavailable('the server is starting', 5, 'starting')
  return JSONResponse({'status': 'ready'})


async def prometheus_metrics(service: Service, request: Request) -> Response:
  """Counters and times, in the format of Prometheus."""
  del request
  text = await asyncio.to_thread(service.metrics.text)
  return Response(text, headers={'Content-Type': metrics.CONTENT_TYPE})


async def page(service: Service, request: Request) -> Response:
  """The chat page; it needs no key, because the page asks the user for one."""
  chat_page = service.page
  if chat_page is None:
    raise ApiError(404, 'this server has no chat page', None, 'not_found')
  etag = chat_page.headers.get('ETag')
  if etag and request.headers.get('if-none-match') == etag:
    return Response(None, 304, headers={'ETag': etag})
  return Response(chat_page.body, headers=chat_page.headers)
