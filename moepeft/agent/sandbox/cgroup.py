# SPDX-License-Identifier: Apache-2.0
"""Memory of a program and all that it starts, whoever holds it.

Buffers of sockets and pipes, page tables, locks, names of files: the kernel
holds them for a program, and they count for none of its processes. A control
group (cgroup v2) counts them. Where none may be made, a watcher looks at the
machine's own figures.
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
# Processes that a sandbox adds: the shell that enters the group, bwrap twice.
HELPER_PROCESSES = 8
# Share of the machine's memory that has to stay available.
_RESERVE = 0.04


class ControlGroup:
  """A control group of this program's making, for one command.

  Attributes:
    path: its directory.
  """

  def __init__(self, path: Path):
    self.path = path

  def wrap(self, command: list[str]) -> list[str]:
    """A command that enters the group before it does anything."""
    enter = 'echo 0 > "$0" && exec "$@"'
    return ['/bin/sh', '-c', enter, str(self.path / 'cgroup.procs'), *command]

  def was_oom_killed(self) -> bool:
    """Whether the kernel has killed processes of the group for their memory."""
    with contextlib.suppress(OSError, ValueError):
      text = (self.path / 'memory.events').read_text()
      events = dict(line.split() for line in text.splitlines())
      return int(events.get('oom_kill', 0)) > 0
    return False

  def close(self) -> None:
    """Ends what is left in it, and removes it."""
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
  """A control group of so many bytes and processes; None where none can be had.

  It lies below this process's own group, or beside it: in cgroup v2 a group
  with processes in it (but the root) hands no controllers on.
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
      # Kernels without swap or before 4.19 have no such file.
      with contextlib.suppress(FileNotFoundError):
        (path / name).write_text(value)
    # Who may make a group may still not be allowed to enter it.
    subprocess.run(
      group.wrap(['/bin/true']), check=True, capture_output=True, timeout=10
    )
  except (OSError, subprocess.SubprocessError):
    group.close()
    return None
  return group


class MachineMemory:
  """The machine's memory as it was, to compare with.

  Watched is what belongs to no program and no file: all that is used, less
  programs' private memory and what the kernel gives back when asked, and files
  in memory. Other programs may make it grow too, so a group may be ended for
  what it did not do, and the sentence says what was seen.
  """

  def __init__(self):
    meminfo = _meminfo()
    self._unowned = _unowned_bytes(meminfo)
    available = meminfo.get('MemAvailable', 0)
    self._reserve = min(_RESERVE * meminfo.get('MemTotal', 0), 0.5 * available)

  def growth(self) -> int:
    """Bytes of such memory that came since."""
    return _unowned_bytes(_meminfo()) - self._unowned

  def is_low(self) -> bool:
    """Whether the available memory is below the reserve."""
    available = _meminfo().get('MemAvailable')
    return available is not None and available < self._reserve


def _meminfo() -> dict[str, int]:
  """Bytes by name; {} where there are no such figures."""
  figures = {}
  with contextlib.suppress(OSError):
    for line in _MEMINFO.read_text().splitlines():
      name, _, rest = line.partition(':')
      number, _, unit = rest.strip().partition(' ')
      if unit == 'kB' and number.isdigit():
        figures[name] = 1024 * int(number)
  with contextlib.suppress(OSError):
    # Free pages that processors keep at hand, which MemFree leaves out.
    counts = re.findall(r'^ +count: +(\d+)$', _ZONEINFO.read_text(), re.M)
    figures['PerCpuFree'] = resource.getpagesize() * sum(map(int, counts))
  return figures


def _unowned_bytes(figures: dict[str, int]) -> int:
  # Cached has Shmem in it, which a file system in memory cannot give back.
  plus = ('MemTotal', 'Shmem')
  minus = (
    'MemFree PerCpuFree Buffers Cached SwapCached AnonPages SReclaimable '
    'Hugetlb'
  )
  return sum(figures.get(name, 0) for name in plus) - sum(
    figures.get(name, 0) for name in minus.split()
  )
