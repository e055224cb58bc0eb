# SPDX-License-Identifier: Apache-2.0
"""A request's body, read within limits: bytes to JSON to a schema."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from moepeft.core import untrusted
from moepeft.serve.http.errors import ApiError, invalid, invalid_request

Schema = TypeVar('Schema', bound=BaseModel)
# Bytes beyond which parsing would hold up other requests on the event loop.
_LONG = 1 << 15


class ClientDisconnected(Exception):
  """The client has left; nobody reads what is answered."""


async def read(request: Request, schema: type[Schema], most: int) -> Schema:
  """A body as its schema.

  Args:
    most: bytes that are read.

  Raises:
    ApiError: it is no JSON, not of the schema (400), or too long (413).
    Gone: the client left before it was read.
  """
  kind = request.headers.get('content-type', '').partition(';')[0].strip()
  if kind.lower() != 'application/json':
    raise invalid_request(
      f'the content type is {kind!r}; send JSON, with the header '
      "'Content-Type: application/json'"
    )
  raw = await _bytes(request, most)
  if len(raw) < _LONG:
    return parse(raw, schema)
  return await asyncio.to_thread(parse, raw, schema)


async def _bytes(request: Request, most: int) -> bytes:
  content_length = request.headers.get('content-length', '0')
  if content_length.isdecimal() and int(content_length[:20]) > most:
    raise too_long(most)
  raw = bytearray()
  try:
    async for chunk in request.stream():
      raw += chunk
      if len(raw) > most:
        raise too_long(most)
  except ClientDisconnect:
    raise ClientDisconnected from None
  return bytes(raw)


def too_long(most: int) -> ApiError:
  return ApiError(
    413,
    f'the body is longer than the {most:,} bytes that the server takes; send '
    'less at once, or start it with a greater --max_body',
    None,
    'body_too_long',
    headers={'Connection': 'close'},
  )


def parse(raw: bytes, schema: type[Schema]) -> Schema:
  """
  Raises:
    ApiError: it is not JSON, or not of the schema.
  """
  try:
    value = untrusted.parse_json(raw, allow_nan=False)
  except untrusted.Malformed as error:
    raise invalid_request(f'the body is {error}') from None
  if not isinstance(value, dict):
    raise invalid_request(
      'the body is JSON, but no object; send {"model": ..., ...}'
    )
  try:
    return schema.model_validate(value)
  except ValidationError as e:
    raise invalid(e) from None
