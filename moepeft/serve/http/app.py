# SPDX-License-Identifier: Apache-2.0
"""The application: routes, and the form of every error."""

import functools
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from moepeft.serve.http import (
  adapters,
  chat,
  completions,
  embeddings,
  probes,
  tokens,
)
from moepeft.serve.http import probes as http_probes
from moepeft.serve.http.cors import Cors
from moepeft.serve.http.errors import Problem
from moepeft.serve.http.middleware import Gate
from moepeft.serve.http.service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]
ROUTES: tuple[tuple[str, str, Handler], ...] = (
  ('GET', '/', probes.page),
  ('GET', '/health', probes.health),
  ('GET', '/ready', probes.ready),
  ('GET', '/metrics', probes.counts),
  ('GET', '/v1/models', http_probes.models),
  ('GET', '/v1/models/{name:path}', http_probes.model),
  ('POST', '/v1/chat/completions', chat.chat),
  ('POST', '/v1/completions', completions.completions),
  ('POST', '/v1/embeddings', embeddings.embeddings),
  ('GET', '/v1/adapters', adapters.listed),
  ('POST', '/v1/adapters', adapters.load),
  ('POST', '/v1/adapters/unload', adapters.unload),
  ('DELETE', '/v1/adapters/{name}', adapters.delete),
  ('POST', '/tokenize', tokens.tokenize),
  ('POST', '/detokenize', tokens.detokenize),
)


def make(service: Service) -> FastAPI:
  """The ASGI application of a service."""
  # Its documents fetch scripts from elsewhere; bodies are read by `body`.
  app = FastAPI(
    title='moepeft', docs_url=None, redoc_url=None, openapi_url=None
  )
  app.router.redirect_slashes = False
  for method, path, handler in ROUTES:
    app.add_api_route(
      path,
      _bound(handler, service),
      methods=[method],
      name=handler.__name__,
      response_model=None,
    )
  app.add_exception_handler(Problem, _told)
  app.add_exception_handler(HTTPException, _otherwise)
  # The last added is the first to see a request.
  app.add_middleware(Gate, service=service)
  app.add_middleware(Cors, origins=service.origins)
  return app


def _bound(handler: Handler, service: Service) -> Callable:
  @functools.wraps(handler)
  async def route(request: Request) -> Response:
    return await handler(service, request)

  # FastAPI reads parameters from it; `wraps` would show the handler's.
  del route.__wrapped__
  return route


async def _told(request: Request, problem: Problem) -> Response:
  del request
  return problem.response()


async def _otherwise(request: Request, e: HTTPException) -> Response:
  """Starlette's own: there is no such route, or not by this method."""
  path = repr(request.url.path)
  said = {
    404: (f'there is no {path}', 'not_found'),
    405: (f'{path} does not take {request.method}', 'method_not_allowed'),
  }
  message, code = said.get(e.status_code, (str(e.detail), None))
  headers = dict(e.headers or {})
  return Problem(e.status_code, message, None, code, headers=headers).response()
