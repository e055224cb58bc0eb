# SPDX-License-Identifier: Apache-2.0
"""Free memory of the host or a device, and out-of-memory errors."""

import errno
import os
from collections.abc import Mapping

import jax

# Texts of XLA's errors. TensorStore uses the same code for a full disk.
_WORDS = ('Out of memory', 'out of memory', 'Failed to allocate')
_CODE = 'RESOURCE_EXHAUSTED'
_DISK = 'No space left on device'
# The memory of a machine and of a control group on Linux.
_MEMINFO = '/proc/meminfo'
_GROUP = '/sys/fs/cgroup'


def is_out_of_memory(error: BaseException) -> bool:
  """Whether an error is out-of-memory on the host or a device."""
  if isinstance(error, MemoryError):
    return True
  if isinstance(error, OSError) and error.errno == errno.ENOMEM:
    return True
  text = str(error)
  if _DISK in text:
    return False
  return _CODE in text or any(word in text for word in _WORDS)


def check_arrays(size: int, name: str, advice: str) -> None:
  """Checks that arrays fit into memory before they are allocated.

  Args:
    size: the size of the arrays in bytes.
    name: the arrays' name, in the plural.
    advice: the flags to lower.

  Raises:
    ValueError: less memory is available; the message has both numbers.
  """
  free, owner = available()
  if free and size > free:
    raise ValueError(
      f'{name} need at least {text(size)} of memory, and {owner} has '
      f'{text(free)}; lower {advice}'
    )


def available() -> tuple[int, str]:
  """(free bytes, the name of their device); 0 bytes if unknown."""
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return _available_on_host(), 'this machine'
  stats: Mapping[str, int] = device.memory_stats() or {}
  free = stats.get('bytes_limit', 0) - stats.get('bytes_in_use', 0)
  return max(free, 0), f'the device {device.device_kind}'


def _available_on_host(meminfo: str = _MEMINFO, group: str = _GROUP) -> int:
  """Available memory and swap, or the limit of a control group if lower."""
  limits = []
  try:
    with open(meminfo) as f:
      lines = dict(line.split(':', 1) for line in f)
    kilobytes = [lines[k].split()[0] for k in ('MemAvailable', 'SwapFree')]
    limits.append(sum(map(int, kilobytes)) * 1024)
  except (OSError, KeyError, ValueError):
    pass
  for max_file, used_file in (
    ('memory.max', 'memory.current'),
    ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
  ):
    try:
      limit, used_bytes = (
        int(_read(os.path.join(group, name))) for name in (max_file, used_file)
      )
      # The group's page cache counts as used and can be dropped.
      folder = os.path.dirname(os.path.join(group, max_file))
      limits.append(max(limit - used_bytes, 0) + _page_cache(folder))
    except (OSError, ValueError):  # no such group, or 'max'
      continue
  return min(limits, default=0)


def _page_cache(folder: str) -> int:
  with open(os.path.join(folder, 'memory.stat')) as f:
    fields = dict(line.split() for line in f)
  return int(fields.get('file', fields.get('total_cache', 0)))


def _read(path: str) -> str:
  with open(path) as f:
    return f.read().strip()


def text(count: float) -> str:
  """2100000000 -> '2.1 GB'."""
  for unit in ('kB', 'MB', 'GB', 'TB'):
    count /= 1000
    if count < 1000:
      return f'{count:.3g} {unit}'
  return f'{count:,.0f} TB'
