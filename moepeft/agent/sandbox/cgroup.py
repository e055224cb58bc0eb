# SPDX-License-Identifier: Apache-2.0
"""Limits the memory of a program, including kernel memory.

Kernel memory such as socket and pipe buffers, page tables, locks and file names
is not counted for any process. A control group (cgroup v2) counts it. If a
group cannot be created, `MachineMemory` estimates it from the machine's total.
"""

import contextlib
import re
import resource
import secrets
import subprocess
import time
from pathlib import Path

_ROOT, _SELF = Path('/sys/fs/cgroup'), Path('/proc/self/cgroup')
_MEMINFO, _ZONEINFO = Path('/proc/meminfo'), Path('/proc/zoneinfo')
# A margin for processes of the sandbox: the shell that enters the group, bwrap.
HELPER_PROCESSES = 8
# The share of the machine's memory that must stay available.
_RESERVE = 0.04


class ControlGroup:
  """A control group for one command.

  Attributes:
    path: its directory.
  """

  def __init__(self, path: Path):
    self.path = path

  def wrap(self, command: list[str]) -> list[str]:
    """A command that enters the group and then runs `command`."""
    enter = 'echo 0 > "$0" && exec "$@"'
    return ['/bin/sh', '-c', enter, str(self.path / 'cgroup.procs'), *command]

  def was_oom_killed(self) -> bool:
    """Whether the kernel killed processes of the group for lack of memory."""
    with contextlib.suppress(OSError, ValueError):
      text = (self.path / 'memory.events').read_text()
      events = dict(line.split() for line in text.splitlines())
      return int(events.get('oom_kill', 0)) > 0
    return False

  def close(self) -> None:
    """Kills the group's processes and removes the group."""
    with contextlib.suppress(OSError):
      (self.path / 'cgroup.kill').write_text('1')
    for _ in range(50):
      try:
        self.path.rmdir()
        return
      except FileNotFoundError:
        return
      except OSError:
        time.sleep(0.02)


def create_group(memory: int, processes: int) -> ControlGroup | None:
  """Creates a control group with limits; None if that is not possible.

  The group is a child or a sibling of this process's group, as in cgroup v2 a
  group with processes (except the root) cannot delegate controllers.
  """
  try:
    (line,) = [
      line for line in _SELF.read_text().splitlines() if line.startswith('0::/')
    ]
  except (OSError, ValueError):
    return None
  current = _ROOT / line.removeprefix('0::/')
  for parent in dict.fromkeys((current, current.parent)):
    if not parent.is_relative_to(_ROOT):
      continue
    with contextlib.suppress(OSError):
      controllers = (parent / 'cgroup.subtree_control').read_text().split()
      if {'memory', 'pids'} <= set(controllers):
        return _create(
          parent / f'moepeft-{secrets.token_hex(8)}', memory, processes
        )
  return None


def _create(path: Path, memory: int, processes: int) -> ControlGroup | None:
  path.mkdir()
  group = ControlGroup(path)
  try:
    (path / 'memory.max').write_text(str(memory))
    (path / 'pids.max').write_text(str(processes + HELPER_PROCESSES))
    for name, value in (('memory.swap.max', '0'), ('memory.oom.group', '1')):
      # Kernels without swap or before 4.19 lack these files.
      with contextlib.suppress(FileNotFoundError):
        (path / name).write_text(value)
    # Entering the group may need more permissions than creating it.
    subprocess.run(
      group.wrap(['/bin/true']), check=True, capture_output=True, timeout=10
    )
  except (OSError, subprocess.SubprocessError):
    group.close()
    return None
  return group


class MachineMemory:
  """Measures the growth of the machine's kernel memory since creation.

  This is used memory, including tmpfs files, without private memory of
  processes and reclaimable memory. Other programs can make it grow, too, and so
  cause a kill; the message has the measured values.
  """

  def __init__(self):
    meminfo = _meminfo()
    self._start_bytes = _kernel_bytes(meminfo)
    available = meminfo.get('MemAvailable', 0)
    self._reserve = min(_RESERVE * meminfo.get('MemTotal', 0), 0.5 * available)

  def growth(self) -> int:
    """The growth in bytes since creation."""
    return _kernel_bytes(_meminfo()) - self._start_bytes

  def is_low(self) -> bool:
    """Whether the available memory is below the reserve."""
    available = _meminfo().get('MemAvailable')
    return available is not None and available < self._reserve


def _meminfo() -> dict[str, int]:
  """{name: bytes} of /proc/meminfo; {} if it cannot be read."""
  sizes = {}
  with contextlib.suppress(OSError):
    for line in _MEMINFO.read_text().splitlines():
      name, _, rest = line.partition(':')
      number, _, unit = rest.strip().partition(' ')
      if unit == 'kB' and number.isdigit():
        sizes[name] = 1024 * int(number)
  with contextlib.suppress(OSError):
    # Free pages in per-CPU lists, which MemFree does not include.
    counts = re.findall(r'^ +count: +(\d+)$', _ZONEINFO.read_text(), re.M)
    sizes['PerCpuFree'] = resource.getpagesize() * sum(map(int, counts))
  return sizes


def _kernel_bytes(sizes: dict[str, int]) -> int:
  # Cached includes Shmem (tmpfs), which is not reclaimable.
  added = ('MemTotal', 'Shmem')
  subtracted = (
    'MemFree PerCpuFree Buffers Cached SwapCached AnonPages SReclaimable '
    'Hugetlb'
  )
  return sum(sizes.get(name, 0) for name in added) - sum(
    sizes.get(name, 0) for name in subtracted.split()
  )
