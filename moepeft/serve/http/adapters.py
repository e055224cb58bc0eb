# SPDX-License-Identifier: Apache-2.0
"""GET, POST and DELETE /v1/adapters: what is loaded, and changing it."""

import asyncio
import dataclasses
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.core.memory import is_out_of_memory
from moepeft.inference import api
from moepeft.serve.http.body import read
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
  shown = _is_admin(service, request)
  entries = [
    _adapter_entry(adapter, shown) for adapter in service.engine.adapters()
  ]
  return JSONResponse({'object': 'list', 'data': entries})


async def load_adapter(service: Service, request: Request) -> JSONResponse:
  """{name, path} of a run or an adapter's directory on the server."""
  _check(service, request)
  body = await read(request, LoadAdapter, service.limits.body)
  try:
    loaded = await asyncio.to_thread(service.models.load, body.name, body.path)
  except Exception as e:
    raise _not_loaded(body.name, e) from None
  _LOG.info('loaded %s from %r (%s)', loaded.name, loaded.source, loaded.sha256)
  return JSONResponse(_adapter_entry(loaded, True))


def _not_loaded(name: str, error: Exception) -> ApiError:
  """The answer to a request whose adapter was not loaded."""
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
  # Files are a caller's, and may hold anything in place of anything else.
  _LOG.error('%s', message, exc_info=error)
  return invalid_request(
    f'{message}: its files do not hold what an adapter has '
    f"({type(error).__name__}; the server's log says where); export it again",
    'path',
  )


async def unload_adapter(service: Service, request: Request) -> JSONResponse:
  """{name}."""
  _check(service, request)
  body = await read(request, UnloadAdapter, service.limits.body)
  return await _unloaded(service, body.name)


async def delete_adapter(service: Service, request: Request) -> JSONResponse:
  """/v1/adapters/NAME."""
  _check(service, request)
  return await _unloaded(service, request.path_params['name'])


async def _unloaded(service: Service, name: str) -> JSONResponse:
  try:
    await asyncio.to_thread(service.models.unload, name)
  except api.UnknownAdapter as e:
    raise refusal_error(e, 'name') from None
  except api.RequestRefused as e:
    raise unavailable(str(e), 10, 'not_ready') from None
  _LOG.info('unloaded %s', name)
  return JSONResponse({'id': name, 'object': 'adapter', 'deleted': True})


def _check(service: Service, request: Request) -> None:
  """
  Raises:
    ApiError: the caller may not change adapters.
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
      'adapters are loaded and unloaded with an admin key; this is none',
      None,
      'not_admin',
      'permission_error',
    )


def _is_admin(service: Service, request: Request) -> bool:
  header = request.headers.get('authorization')
  return service.keys.may_change(header and header.encode('latin-1'))


def _adapter_entry(
  loaded: api.LoadedAdapter, with_source: bool
) -> dict[str, Any]:
  """
  Args:
    with_source: whether the card has the adapter's path on the server.
  """
  fields = dataclasses.asdict(loaded)
  if not with_source:
    del fields['source']
  return {'id': loaded.name, 'object': 'adapter', **fields}
