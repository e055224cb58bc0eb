# SPDX-License-Identifier: Apache-2.0
"""Error responses, {"error": {message, type, param, code}} as OpenAI's."""

import math

from pydantic import ValidationError
from starlette.responses import JSONResponse

from moepeft.inference import api

INVALID = 'invalid_request_error'
SERVER = 'server_error'


class ApiError(Exception):
  """An error response in OpenAI's format.

  Attributes:
    status: the HTTP status.
    message: the error message.
    kind: the field `type`.
    param: the invalid field of the request, or None.
    code: the error code, such as 'model_not_found'.
    headers: the headers of the response.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = INVALID,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.kind = status, message, kind
    self.param, self.code, self.headers = param, code, headers or {}

  def body(self) -> dict:
    return {
      'error': {
        'message': self.message,
        'type': self.kind,
        'param': self.param,
        'code': self.code,
      }
    }

  def response(self) -> JSONResponse:
    return JSONResponse(self.body(), self.status, headers=self.headers)


def invalid_request(message: str, param: str | None = None) -> ApiError:
  """The error of an invalid request: 400."""
  return ApiError(400, message, param)


def model_not_found(name: str, names: list[str]) -> ApiError:
  return ApiError(
    404,
    f'the model {name!r} does not exist; there are {", ".join(names)}',
    'model',
    'model_not_found',
  )


def unavailable(message: str, seconds: float, code: str) -> ApiError:
  """The error of a busy server: 503, with the seconds until a retry."""
  return ApiError(503, message, None, code, SERVER, _retry_after(seconds))


def server_error(message: str) -> ApiError:
  """The error of a failed server: 500."""
  return ApiError(500, message, None, 'internal_error', SERVER)


def refusal_error(e: api.RequestRefused, param: str) -> ApiError:
  """The error of a request that the engine did not accept.

  Args:
    param: the field that holds the prompt.
  """
  if isinstance(e, api.EngineFull):
    kind, headers = 'rate_limit_error', _retry_after(e.seconds)
    return ApiError(429, str(e), None, 'queue_full', kind, headers)
  if isinstance(e, api.UnknownAdapter):
    return ApiError(404, str(e), 'model', 'model_not_found')
  if isinstance(e, api.PromptTooLong):
    return ApiError(400, str(e), param, 'context_length_exceeded')
  return invalid_request(str(e), None)


def validation_error(e: ValidationError) -> ApiError:
  """The error of a body that does not match its schema."""
  details = e.errors(include_url=False, include_context=True)
  # A union has errors for each member; the deepest is of the intended member.
  first = max(details, key=lambda error: len(error['loc']))
  param = _field_path(first['loc'])
  if first['type'] == 'extra_forbidden':
    return invalid_request(f'unknown field {param!r}; leave it out', param)
  if first['type'] == 'missing':
    return invalid_request(f'the field {param!r} is missing', param)
  reason = first['msg'].removeprefix('Value error, ')
  if first['type'] == 'value_error':
    return invalid_request(
      f'{param}: {reason}' if param else reason, param or None
    )
  return invalid_request(
    f'{param}: {reason}; got {_shorten(first["input"])}', param
  )


def _field_path(loc: tuple) -> str:
  """('messages', 0, 'content') -> 'messages[0].content'."""
  text = ''
  for part in loc:
    if isinstance(part, int):
      text += f'[{part}]'
    elif not part.endswith(']') and part not in _UNION_MEMBERS:
      text += f'.{part}' if text else part
  return text


# pydantic adds the name of a union's member to the path.
_UNION_MEMBERS = {'str', 'int', 'bool', 'float', 'ContentPart'}


def _shorten(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def _retry_after(seconds: float) -> dict[str, str]:
  return {'Retry-After': str(max(1, math.ceil(seconds)))}
