# SPDX-License-Identifier: Apache-2.0
"""API keys: read from files, compared in constant time."""

import dataclasses
import hmac
import os
from collections.abc import Sequence

from moepeft.core import files

_SCHEME = b'bearer '


@dataclasses.dataclass(frozen=True)
class ApiKeys:
  """API keys of clients, and of administrators who may change adapters.

  Attributes:
    users: any of these may ask; () lets everybody.
    admins: any of these may load adapters too; () lets nobody.
  """

  users: tuple[bytes, ...] = ()
  admins: tuple[bytes, ...] = ()

  def may_ask(self, header: bytes | None) -> bool:
    """
    Args:
      header: the value of Authorization, None where there is none.
    """
    if not self.users:
      return True
    return _is_listed(header, self.users + self.admins)

  def may_change(self, header: bytes | None) -> bool:
    return _is_listed(header, self.admins)


def _is_listed(header: bytes | None, keys: Sequence[bytes]) -> bool:
  """Whether a header holds a key, in a time that does not tell how nearly."""
  header = header or b''
  if header[: len(_SCHEME)].lower() != _SCHEME:
    return False
  token = header[len(_SCHEME) :].strip()
  # Every key is compared: leaving early would tell which one it was.
  return any([hmac.compare_digest(token, key) for key in keys])


def read(path: str, flag: str) -> tuple[bytes, ...]:
  """The keys of a file, one a line; '#' begins a remark. () without a path.

  Raises:
    ValueError: it cannot be read, holds none, or one has a space or a letter
      that a header cannot hold.
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
    raise ValueError(f'--{flag}={path!r} holds no key; write one a line')
  for place, key in enumerate(keys, 1):
    if not (key.isascii() and key.isprintable() and ' ' not in key):
      raise ValueError(
        f'key {place} of --{flag}={path!r} holds a space or a letter beyond '
        'ASCII, which no client can send; write another'
      )
  return tuple(key.encode() for key in keys)
