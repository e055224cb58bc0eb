# SPDX-License-Identifier: Apache-2.0
"""Checks of the host, the origin and the key of a request."""

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from moepeft.core import http_access
from moepeft.core.http_access import ApiKeys
from moepeft.serve.http.errors import ApiError


def check_host(hosts: Sequence[str], headers: Mapping[bytes, bytes]) -> None:
  """Refuses DNS rebinding: a foreign page whose name resolves to this machine.

  Args:
    hosts: from `http_access.accepted_hosts`.

  Raises:
    ApiError: the header Host names another host.
  """
  host = headers.get(b'host', b'').decode('latin-1')
  if hosts and http_access.without_port(host) not in hosts:
    raise ApiError(
      403,
      f'the host {host!r} is not one of {", ".join(hosts)}; use one '
      'of these, or start the server with an API key',
      None,
      'wrong_host',
    )


def check_origin(headers: Mapping[bytes, bytes]) -> None:
  """Refuses requests that a page of another site makes a browser send.

  Raises:
    ApiError: the header Origin, which browsers add, is not that of the host.
  """
  origin = headers.get(b'origin', b'').decode('latin-1')
  host = headers.get(b'host', b'').decode('latin-1')
  if origin and urlsplit(origin).netloc.lower() != host.lower():
    raise ApiError(
      403,
      f'the request comes from a page of {origin!r}; only those of this server '
      'may send requests',
      None,
      'wrong_origin',
    )


def check_key(keys: ApiKeys, headers: Mapping[bytes, bytes]) -> None:
  """
  Raises:
    ApiError: there are keys, and the header Authorization has none of them.
  """
  if not keys.is_authorized(headers.get(b'authorization')):
    raise ApiError(
      401,
      'the API key is missing or wrong; send the header '
      "'Authorization: Bearer KEY'",
      None,
      'invalid_api_key',
      headers={'WWW-Authenticate': 'Bearer'},
    )
