# SPDX-License-Identifier: Apache-2.0
"""GET, POST and DELETE /v1/adapters: lists, loads and unloads adapters."""

import asyncio
import dataclasses
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.core.memory import is_out_of_memory
from moepeft.inference import api
from moepeft.serve.http.body import read_body
from moepeft.serve.http.errors import (
  SERVER,
  ApiError,
  invalid_request,
  refusal_error,
  unavailable,
)
from moepeft.serve.http.schemas import LoadAdapter, UnloadAdapter
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')


async def list_adapters(service: Service, request: Request) -> JSONResponse:
  """The loaded adapters; their paths are shown to admin keys alone."""
  is_admin = _is_admin(service, request)
  entries = [
    _adapter_entry(adapter, is_admin) for adapter in service.engine.adapters()
  ]
  return JSONResponse({'object': 'list', 'data': entries})


async def load_adapter(service: Service, request: Request) -> JSONResponse:
  """Loads an adapter; the body is {name, path}, a path on the server."""
  _require_admin(service, request)
  body = await read_body(request, LoadAdapter, service.limits.body)
  try:
    loaded = await asyncio.to_thread(service.models.load, body.name, body.path)
  except Exception as e:
    raise _load_error(body.name, e) from None
  _LOG.info('loaded %s from %r (%s)', loaded.name, loaded.source, loaded.sha256)
  return JSONResponse(_adapter_entry(loaded, True))


def _load_error(name: str, error: Exception) -> ApiError:
  """The error response for an adapter that could not be loaded."""
  message = f'the adapter {name!r} is not loaded'
  if isinstance(error, api.RequestRefused):
    return unavailable(f'{message}: {error}', 10, 'not_ready')
  if is_out_of_memory(error):
    _LOG.error('%s: %s', message, error)
    return ApiError(
      507,
      f'{message}: memory has run out; unload others, or start the server with '
      'fewer --adapter_slots',
      'path',
      'out_of_memory',
      SERVER,
    )
  if isinstance(error, ValueError | OSError):
    return invalid_request(f'{message}: {error}', 'path')
  # The files are the client's, so any error may come from their content.
  _LOG.error('%s', message, exc_info=error)
  return invalid_request(
    f'{message}: its files are not those of an adapter '
    f"({type(error).__name__}; see the server's log); export it again",
    'path',
  )


async def unload_adapter(service: Service, request: Request) -> JSONResponse:
  """Unloads an adapter; the body is {name}."""
  _require_admin(service, request)
  body = await read_body(request, UnloadAdapter, service.limits.body)
  return await _unload(service, body.name)


async def delete_adapter(service: Service, request: Request) -> JSONResponse:
  """Unloads an adapter; the path is /v1/adapters/NAME."""
  _require_admin(service, request)
  return await _unload(service, request.path_params['name'])


async def _unload(service: Service, name: str) -> JSONResponse:
  try:
    await asyncio.to_thread(service.models.unload, name)
  except api.UnknownAdapter as e:
    raise refusal_error(e, 'name') from None
  except api.RequestRefused as e:
    raise unavailable(str(e), 10, 'not_ready') from None
  _LOG.info('unloaded %s', name)
  return JSONResponse({'id': name, 'object': 'adapter', 'deleted': True})


def _require_admin(service: Service, request: Request) -> None:
  """Checks that the request has an admin key.

  Raises:
    ApiError: it has none.
  """
  if not service.keys.admins:
    raise ApiError(
      403,
      'adapters are loaded and unloaded with an admin key, and the server was '
      'started without --admin_key_file',
      None,
      'adapters_locked',
      'permission_error',
    )
  if not _is_admin(service, request):
    raise ApiError(
      403,
      'adapters are loaded and unloaded with an admin key; the key is not one',
      None,
      'not_admin',
      'permission_error',
    )


def _is_admin(service: Service, request: Request) -> bool:
  header = request.headers.get('authorization')
  return service.keys.is_admin(header and header.encode('latin-1'))


def _adapter_entry(
  loaded: api.LoadedAdapter, with_source: bool
) -> dict[str, Any]:
  """Makes the JSON object of an adapter.

  Args:
    with_source: whether it contains the adapter's path on the server.
  """
  fields = dataclasses.asdict(loaded)
  if not with_source:
    del fields['source']
  return {'id': loaded.name, 'object': 'adapter', **fields}
