# SPDX-License-Identifier: Apache-2.0
"""Whether the server lives and can answer, its counts, and its page."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.serve.http import metrics
from moepeft.serve.http.errors import Problem, later
from moepeft.serve.http.service import Service


async def health(service: Service, request: Request) -> Response:
  """The process answers; it may still be starting."""
  del service, request
  return JSONResponse({'status': 'alive'})


async def ready(service: Service, request: Request) -> Response:
  """A generation has run, and the server is not going down."""
  del request
  if service.draining:
    raise later('the server is going down', 10, 'draining')
  if not service.engine.ready:
    raise later('the server is starting', 5, 'starting')
  return JSONResponse({'status': 'ready'})


async def counts(service: Service, request: Request) -> Response:
  del request
  text = await asyncio.to_thread(service.metrics.text)
  return Response(text, headers={'Content-Type': metrics.CONTENT})


async def page(service: Service, request: Request) -> Response:
  """The chat page, a file without secrets, which asks for a key itself."""
  found = service.page
  if found is None:
    raise Problem(404, 'this server has no chat page', None, 'not_found')
  tag = found.headers.get('ETag')
  if tag and request.headers.get('if-none-match') == tag:
    return Response(None, 304, headers={'ETag': tag})
  return Response(found.body, headers=found.headers)
