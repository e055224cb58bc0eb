# SPDX-License-Identifier: Apache-2.0
"""Access to an HTTP server: its socket, API keys, and the header Host.

Keys are read from files and compared in constant time.
"""

import dataclasses
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Sequence

from moepeft.core import files

_SCHEME = b'bearer '
_LOOPBACK_HOSTS = ('localhost', '127.0.0.1', '[::1]')


@dataclasses.dataclass(frozen=True)
class ApiKeys:
  """API keys of clients, and of administrators who may change adapters.

  Attributes:
    users: keys of clients; () accepts requests without a key.
    admins: keys of clients that may also load adapters; () allows nobody.
  """

  users: tuple[bytes, ...] = ()
  admins: tuple[bytes, ...] = ()

  def is_authorized(self, header: bytes | None) -> bool:
    """Whether a request may be answered.

    Args:
      header: the value of the header Authorization, or None.
    """
    if not self.users:
      return True
    return _is_listed(header, self.users + self.admins)

  def is_admin(self, header: bytes | None) -> bool:
    return _is_listed(header, self.admins)


def _is_listed(header: bytes | None, keys: Sequence[bytes]) -> bool:
  """Whether a header has one of the keys, in constant time."""
  header = header or b''
  if header[: len(_SCHEME)].lower() != _SCHEME:
    return False
  token = header[len(_SCHEME) :].strip()
  # A list, so that all keys are compared and the time does not depend on them.
  return any([hmac.compare_digest(token, key) for key in keys])


def read_keys(path: str, flag: str) -> tuple[bytes, ...]:
  """Reads a file of keys, one a line; '#' begins a comment. () without a path.

  Raises:
    ValueError: the file cannot be read, has no key, or a key with characters
      that a header cannot have.
  """
  if not path:
    return ()
  try:
    with files.open_file(os.path.expanduser(path), 'r') as f:
      lines = [line.strip() for line in f]
  except (OSError, UnicodeDecodeError) as e:
    reason = e.strerror if isinstance(e, OSError) else 'it is not UTF-8'
    raise ValueError(
      f'--{flag}={path!r} cannot be read ({reason}); name a file of keys, one '
      'a line'
    ) from None
  keys = [line for line in lines if line and not line.startswith('#')]
  if not keys:
    raise ValueError(f'--{flag}={path!r} has no key; write one on each line')
  for number, key in enumerate(keys, 1):
    if not (key.isascii() and key.isprintable() and ' ' not in key):
      raise ValueError(
        f'key {number} of --{flag}={path!r} has a space or a character beyond '
        'ASCII, which a header cannot contain; use another key'
      )
  return tuple(key.encode() for key in keys)


def listen(host: str, port: int) -> socket.socket:
  """Opens the listening socket.

  Raises:
    ValueError: the address is in use, or not one of this machine.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
    listener.listen(1024)
  except (OSError, OverflowError) as e:
    listener.close()
    reason = getattr(e, 'strerror', None) or str(e)
    raise ValueError(
      f'cannot listen on --host={host} --port={port} ({reason}); name another'
    ) from None
  return listener


def base_url(host: str, port: int) -> str:
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def is_loopback(host: str) -> bool:
  """Whether an address is reachable only from this machine."""
  try:
    return host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def accepted_hosts(host: str, keys: ApiKeys) -> tuple[str, ...]:
  """Accepted values of the header Host, without a port; () for any.

  A page of another site can reach this machine by a host name that resolves to
  it (DNS rebinding). With keys any host is accepted: such a page knows none.

  Args:
    host: the address that the server listens on.
  """
  if keys.users or not is_loopback(host):
    return ()
  return (*_LOOPBACK_HOSTS, host)


def without_port(host: str) -> str:
  """A header Host without its port: '[::1]:8000' -> '[::1]'."""
  return re.sub(r':\d*$', '', host).lower()
