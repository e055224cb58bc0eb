# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: routes, middleware and error responses."""

import functools
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from moepeft.serve.http import (
  adapters,
  chat,
  completions,
  embeddings,
  openapi,
  probes,
  responses,
  tokens,
)
from moepeft.serve.http.errors import ApiError
from moepeft.serve.http.middleware import RequestMiddleware
from moepeft.serve.http.service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]
ROUTES: tuple[tuple[str, str, Handler], ...] = (
  ('GET', '/', probes.page),
  ('GET', '/health', probes.health),
  ('GET', '/ready', probes.ready),
  ('GET', '/metrics', probes.prometheus_metrics),
  ('GET', '/openapi.json', openapi.openapi),
  ('GET', '/v1/models', probes.models),
  ('GET', '/v1/models/{name:path}', probes.model),
  ('POST', '/v1/chat/completions', chat.chat),
  ('POST', '/v1/completions', completions.completions),
  ('POST', '/v1/responses', responses.responses),
  ('POST', '/v1/embeddings', embeddings.embeddings),
  ('GET', '/v1/adapters', adapters.list_adapters),
  ('POST', '/v1/adapters', adapters.load_adapter),
  ('POST', '/v1/adapters/unload', adapters.unload_adapter),
  ('DELETE', '/v1/adapters/{name}', adapters.delete_adapter),
  ('POST', '/tokenize', tokens.tokenize),
  ('POST', '/detokenize', tokens.detokenize),
)


def make_app(service: Service) -> FastAPI:
  """The ASGI application of a service."""
  # Without documentation pages, which load scripts from other hosts. Handlers
  # read bodies themselves, so FastAPI could not describe them; see `openapi`.
  app = FastAPI(
    title='moepeft', docs_url=None, redoc_url=None, openapi_url=None
  )
  app.router.redirect_slashes = False
  for method, path, handler in ROUTES:
    app.add_api_route(
      path,
      _bind_service(handler, service),
      methods=[method],
      name=handler.__name__,
      response_model=None,
    )
  app.add_exception_handler(ApiError, _error_response)
  app.add_exception_handler(HTTPException, _http_exception_response)
  # The middleware that is added last runs first.
  app.add_middleware(RequestMiddleware, service=service)
  if service.origins:
    app.add_middleware(
      CORSMiddleware,
      allow_origins=service.origins,
      allow_methods=['GET', 'POST', 'DELETE'],
      allow_headers=['*'],
      expose_headers=['x-request-id', 'retry-after'],
    )
  return app


def _bind_service(handler: Handler, service: Service) -> Callable:
  @functools.wraps(handler)
  async def route(request: Request) -> Response:
    return await handler(service, request)

  # FastAPI would take the handler's signature from it.
  del route.__wrapped__
  return route


async def _error_response(request: Request, error: ApiError) -> Response:
  del request
  return error.response()


async def _http_exception_response(
  request: Request, e: HTTPException
) -> Response:
  """The response for an unknown route or method."""
  path = repr(request.url.path)
  messages = {
    404: (f'there is no {path}', 'not_found'),
    405: (f'{path} does not take {request.method}', 'method_not_allowed'),
  }
  message, code = messages.get(e.status_code, (str(e.detail), None))
  headers = dict(e.headers or {})
  return ApiError(
    e.status_code, message, None, code, headers=headers
  ).response()
