# SPDX-License-Identifier: Apache-2.0
"""Checks that arrays of the server fit into memory before they are made."""

import pathlib

import jax

_MEMINFO = '/proc/meminfo'
_GROUP = '/sys/fs/cgroup'


def check(size: int, name: str, advice: str) -> None:
  """
  Args:
    size: bytes that are to be allocated.
    name: of the arrays, a plural.
    advice: the flags to lower.

  Raises:
    ValueError: there are fewer bytes; the message has both figures.
  """
  there = available()
  if there is not None and size > there:
    raise ValueError(
      f'{name} need {_text(size)} of memory, and {_text(there)} are available; '
      f'lower {advice}'
    )


def available() -> int | None:
  """Bytes that the device may still allocate; None where nothing says so."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    if 'bytes_limit' not in stats:
      return None
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  figures = [figure for figure in (_of_host(), _of_group()) if figure]
  return min(figures, default=None)


def _of_host() -> int | None:
  try:
    with open(_MEMINFO) as file:
      lines = dict(line.split(':', 1) for line in file)
    return int(lines['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None


def _of_group() -> int | None:
  """What the limit of the process's control group leaves, of version 2."""
  try:
    limit, used = (
      int(pathlib.Path(_GROUP, name).read_text())
      for name in ('memory.max', 'memory.current')
    )
  except (OSError, ValueError):
    # No group, or the limit is 'max'.
    return None
  return max(limit - used, 1)


def _text(size: int) -> str:
  return f'{size / 1e9:,.1f} GB' if size >= 1e8 else f'{size / 1e6:,.1f} MB'
