# SPDX-License-Identifier: Apache-2.0
"""GET, POST and DELETE /v1/adapters: what is loaded, and changing it."""

import asyncio
import dataclasses
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from moepeft.serve import protocol
from moepeft.serve.http.body import read
from moepeft.serve.http.errors import Problem, refused, wrong
from moepeft.serve.http.schemas import Load, Unload
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')


async def listed(service: Service, request: Request) -> JSONResponse:
  del request
  found = [_card(one) for one in service.engine.adapters()]
  return JSONResponse({'object': 'list', 'data': found})


async def load(service: Service, request: Request) -> JSONResponse:
  """{name, path} of a run or an adapter's directory on the server."""
  _check(service, request)
  asked = await read(request, Load, service.limits.body)
  try:
    loaded = await asyncio.to_thread(
      service.models.load, asked.name, asked.path
    )
  except (ValueError, OSError) as e:
    raise wrong(f'the adapter {asked.name!r} is not loaded: {e}') from None
  _LOG.info('loaded %s from %s (%s)', loaded.name, loaded.source, loaded.sha256)
  return JSONResponse(_card(loaded))


async def unload(service: Service, request: Request) -> JSONResponse:
  """{name}."""
  _check(service, request)
  asked = await read(request, Unload, service.limits.body)
  return await _unloaded(service, asked.name)


async def delete(service: Service, request: Request) -> JSONResponse:
  """/v1/adapters/NAME."""
  _check(service, request)
  return await _unloaded(service, request.path_params['name'])


async def _unloaded(service: Service, name: str) -> JSONResponse:
  try:
    await asyncio.to_thread(service.models.unload, name)
  except protocol.Refused as e:
    raise refused(e, 'name') from None
  _LOG.info('unloaded %s', name)
  return JSONResponse({'id': name, 'object': 'adapter', 'deleted': True})


def _check(service: Service, request: Request) -> None:
  """
  Raises:
    Problem: the caller may not change adapters.
  """
  if not service.keys.admins:
    raise Problem(
      403,
      'adapters are loaded and unloaded with an admin key, and the server was '
      'started without --admin_key_file',
      None,
      'adapters_locked',
      'permission_error',
    )
  header = request.headers.get('authorization')
  if not service.keys.may_change(header and header.encode('latin-1')):
    raise Problem(
      403,
      'adapters are loaded and unloaded with an admin key; this is none',
      None,
      'not_admin',
      'permission_error',
    )


def _card(loaded: protocol.Loaded) -> dict[str, Any]:
  return {
    'id': loaded.name,
    'object': 'adapter',
    **dataclasses.asdict(loaded),
  }
