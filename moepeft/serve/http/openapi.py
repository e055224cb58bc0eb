# SPDX-License-Identifier: Apache-2.0
"""GET /openapi.json: the routes and the bodies of requests, for tools."""

import inspect
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from moepeft import __version__
from moepeft.serve.http import schemas
from moepeft.serve.http.middleware import KEYLESS_PATHS
from moepeft.serve.http.responses_body import ResponsesBody
from moepeft.serve.http.service import Service

Json = dict[str, Any]
# {path of a POST route: its body}.
BODIES = {
  '/v1/chat/completions': schemas.Chat,
  '/v1/completions': schemas.Completion,
  '/v1/responses': ResponsesBody,
  '/v1/embeddings': schemas.EmbeddingsBody,
  '/v1/adapters': schemas.LoadAdapter,
  '/v1/adapters/unload': schemas.UnloadAdapter,
  '/tokenize': schemas.Tokenize,
  '/detokenize': schemas.Detokenize,
}
_MEDIA_TYPES = {'/': 'text/html', '/metrics': 'text/plain'}
_ERROR = {
  'type': 'object',
  'required': ['error'],
  'properties': {
    'error': {
      'type': 'object',
      'required': ['message', 'type', 'param', 'code'],
      'properties': {
        'message': {'type': 'string'},
        'type': {'type': 'string'},
        'param': {'type': ['string', 'null']},
        'code': {'type': ['string', 'null']},
      },
    }
  },
}


async def openapi(service: Service, request: Request) -> JSONResponse:
  """This description, in OpenAPI's form."""
  return JSONResponse(make_document(request.app.routes, service.keys.users))


def make_document(routes: Sequence[Route], needs_key: Any) -> Json:
  """Makes an OpenAPI document.

  Args:
    needs_key: whether requests need a key.
  """
  _, definitions = models_json_schema(
    [(body, 'validation') for body in BODIES.values()],
    ref_template='#/components/schemas/{model}',
  )
  document: Json = {
    'openapi': '3.1.0',
    'info': {'title': 'moepeft', 'version': __version__},
    'paths': {},
    'components': {'schemas': {**definitions['$defs'], 'Error': _ERROR}},
  }
  if needs_key:
    bearer = {'type': 'http', 'scheme': 'bearer'}
    document['components']['securitySchemes'] = {'key': bearer}
    document['security'] = [{'key': []}]
  for route in routes:
    # Without the kind of a parameter: '{name:path}' -> '{name}'.
    path = route.path_format
    operations = document['paths'].setdefault(path, {})
    for method in route.methods - {'HEAD'}:
      operations[method.lower()] = _operation(route, path, method)
      if needs_key and path in KEYLESS_PATHS:
        operations[method.lower()]['security'] = []
  return document


def _operation(route: Route, path: str, method: str) -> Json:
  media_type = _MEDIA_TYPES.get(path, 'application/json')
  content = {media_type: {}}
  body = BODIES.get(path) if method == 'POST' else None
  if body is not None and 'stream' in body.model_fields:
    content['text/event-stream'] = {}
  error = {'$ref': '#/components/schemas/Error'}
  operation: Json = {
    'operationId': route.name,
    'description': inspect.getdoc(route.endpoint),
    'responses': {
      '200': {'description': 'The answer.', 'content': content},
      'default': {
        'description': 'An error.',
        'content': {'application/json': {'schema': error}},
      },
    },
  }
  if '{name}' in path:
    operation['parameters'] = [
      {
        'name': 'name',
        'in': 'path',
        'required': True,
        'schema': {'type': 'string'},
      }
    ]
  if body is not None:
    schema = {'$ref': f'#/components/schemas/{body.__name__}'}
    operation['requestBody'] = {
      'required': True,
      'content': {'application/json': {'schema': schema}},
    }
  return operation
