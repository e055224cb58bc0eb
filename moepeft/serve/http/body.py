# SPDX-License-Identifier: Apache-2.0
"""Reads a request's body, with a size limit, and checks it against a schema."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from moepeft.core import untrusted
from moepeft.serve.http.errors import (
  ApiError,
  invalid_request,
  validation_error,
)

Schema = TypeVar('Schema', bound=BaseModel)
# Longer bodies are parsed on a thread, so that the event loop is not blocked.
_MAX_INLINE_BYTES = 1 << 15


class ClientDisconnected(Exception):
  """The client has disconnected before the response."""


async def read_body(
  request: Request, schema: type[Schema], max_bytes: int
) -> Schema:
  """Reads and parses a body.

  Args:
    max_bytes: the maximum size of the body.

  Raises:
    ApiError: it is not JSON or does not match the schema (400), or is too long
      (413).
    ClientDisconnected: the client disconnected before the end of the body.
  """
  content_type = (
    request.headers.get('content-type', '').partition(';')[0].strip()
  )
  if content_type.lower() != 'application/json':
    raise invalid_request(
      f'the content type is {content_type!r}; send JSON, with the header '
      "'Content-Type: application/json'"
    )
  raw = await _read_bytes(request, max_bytes)
  if len(raw) < _MAX_INLINE_BYTES:
    return parse_body(raw, schema)
  return await asyncio.to_thread(parse_body, raw, schema)


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
  content_length = request.headers.get('content-length', '0')
  if content_length.isdecimal() and int(content_length[:20]) > max_bytes:
    raise _too_long_error(max_bytes)
  raw = bytearray()
  try:
    async for chunk in request.stream():
      raw += chunk
      if len(raw) > max_bytes:
        raise _too_long_error(max_bytes)
  except ClientDisconnect:
    raise ClientDisconnected from None
  return bytes(raw)


def _too_long_error(max_bytes: int) -> ApiError:
  return ApiError(
    413,
    f'the body is longer than {max_bytes:,} bytes; send less at once, or start '
    'the server with a greater --max_body',
    None,
    'body_too_long',
    headers={'Connection': 'close'},
  )


def parse_body(raw: bytes, schema: type[Schema]) -> Schema:
  """Parses a body.

  Raises:
    ApiError: it is not JSON, or does not match the schema.
  """
  try:
    value = untrusted.parse_json(raw, allow_nan=False)
  except untrusted.Malformed as error:
    raise invalid_request(f'the body is {error}') from None
  if not isinstance(value, dict):
    raise invalid_request(
      'the body is not a JSON object; send {"model": ..., ...}'
    )
  try:
    return schema.model_validate(value)
  except ValidationError as e:
    raise validation_error(e) from None
