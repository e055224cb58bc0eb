# SPDX-License-Identifier: Apache-2.0
"""Runs a program under limits of time, memory, processes and output."""

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from moepeft.agent.sandbox import cgroup

# Directories of a sandbox that are file systems in memory; the first one is on
# no other system.
MEMORY_DIRECTORIES = ('/sandbox', '/tmp', '/dev/shm')
# Bytes of a name in one: its inode, its entry, the name itself.
_FILE_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class ResourceLimits:
  """Limits of a program and of all that it starts.

  Attributes:
    seconds: on the wall, together; and of CPU, each process.
    memory: bytes, of all processes together and of what the kernel holds for
      them.
    address_space: bytes that a process may map; None for as many as `memory`.
    processes: and threads, at once.
    disk: bytes of the work directory, and of each file.
    output: bytes that are kept, the beginning and the end.
  """

  seconds: float = 30.0
  memory: int = 1 << 30
  processes: int = 64
  disk: int = 64 << 20
  output: int = 20_000
  address_space: int | None = None


@dataclasses.dataclass(frozen=True)
class ProcessResult:
  """The output and exit status of a program.

  Attributes:
    output: what it printed, both streams.
    code: its exit status; None where it was ended.
    ended: why it was, a sentence; else ''.
  """

  output: str
  code: int | None
  ended: str = ''

  def __str__(self) -> str:
    ended = self.ended or (self.code and f'exit status {self.code}')
    output = self.output.rstrip('\n')
    note = f'[{ended}]' if ended else '' if output else '[no output]'
    return '\n'.join(filter(None, [output, note]))


def run_limited(
  command: Sequence[str],
  limits: ResourceLimits,
  environment: Mapping[str, str],
  pass_fds: Sequence[int] = (),
  cwd: str | None = None,
) -> ProcessResult:
  """Runs a command until it ends, or is ended for what it uses.

  Args:
    command: and its arguments; no shell reads them.
    bounds: of these the time, the memory, the number of processes and the
      output are held here.
    environment: all of it.
    pass_fds: file descriptors that it inherits.
    cwd: where it runs; None is here.
  """
  group = cgroup.create_group(limits.memory, limits.processes)
  try:
    command = group.wrapped(list(command)) if group else command
    return _run(command, limits, environment, pass_fds, cwd, group)
  finally:
    if group:
      group.close()


def _run(command, limits, environment, pass_fds, cwd, group) -> ProcessResult:
  machine = cgroup.MachineMemory()
  try:
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      pass_fds=pass_fds,
      cwd=cwd,
      env=dict(environment),
      start_new_session=True,
    )
  except (OSError, ValueError) as e:
    # Arguments that are too long, hold a NUL or half of a surrogate pair.
    return ProcessResult('', None, f'it does not start: {e}')
  buffer = _OutputBuffer(limits.output)
  reader = threading.Thread(
    target=buffer.drain, args=(process.stdout,), daemon=True
  )
  reader.start()
  try:
    ended = _wait(process, limits, group, machine)
  finally:
    # The sandbox ends with bwrap; without one, the session does.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, 9)
    process.kill()
    process.wait()
    reader.join(5)
  if not ended and group and group.exceeded():
    ended = f'ended: it had more than {limits.memory >> 20:,} MB of memory'
  return ProcessResult(
    buffer.text(), None if ended else process.returncode, ended
  )


def _wait(
  process, limits: ResourceLimits, group, machine: cgroup.MachineMemory
) -> str:
  """The reason to end a process; '' once it has ended by itself."""
  start, allowance = time.monotonic(), f'{limits.memory >> 20:,} are allowed'
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(0.1)
      return ''
    if time.monotonic() - start > limits.seconds:
      return f'ended after {limits.seconds:.3g} s'
    used, threads = _usage(process.pid)
    if used > limits.memory:
      return (
        f'ended: all its processes together had {used >> 20:,} MB of memory, '
        f'{allowance}'
      )
    if threads > limits.processes + cgroup.HELPERS:
      return (
        f'ended: it had {threads} processes and threads, {limits.processes} '
        'are allowed'
      )
    # A control group counts what the kernel holds, and counts no others'.
    if not group and (grown := machine.growth()) + used > limits.memory:
      return (
        f'ended: its processes had {used >> 20:,} MB of memory, and memory of '
        f'no process (buffers of sockets and pipes, files in memory) grew by '
        f'{grown >> 20:,} MB on this machine, {allowance}'
      )
    if machine.is_short():
      return 'ended: the machine has hardly any memory left'


def _usage(pid: int) -> tuple[int, int]:
  """Bytes of a process and all its descendants, and their threads.

  Bytes are private memory, in swap too, and names of files in memory, which the
  machine's figures tell as if the kernel could give them back.
  """
  resident, threads, children = {}, {}, {}
  for name in filter(str.isdigit, os.listdir('/proc')):
    with contextlib.suppress(OSError, ValueError, KeyError):
      with open(f'/proc/{name}/status') as lines:
        status = dict(line.split(':', 1) for line in lines)
      children.setdefault(int(status['PPid']), []).append(int(name))
      resident[int(name)] = sum(
        int(status[key].split()[0]) for key in ('RssAnon', 'VmSwap')
      )
      threads[int(name)] = int(status['Threads'])
  pids, pending = set(), [pid]
  while pending:
    pids.add(parent := pending.pop())
    pending += set(children.get(parent, ())) - pids
  return (
    1024 * sum(resident.get(pid, 0) for pid in pids)
    + _FILE_BYTES * _file_count(pids),
    sum(threads.get(pid, 0) for pid in pids),
  )


def _file_count(pids: Iterable[int]) -> int:
  """Files and links in the file systems in memory that processes see."""
  for pid in pids:
    # Outside of the sandbox there is no such directory.
    with contextlib.suppress(OSError):
      statuses = [
        os.statvfs(f'/proc/{pid}/root{path}') for path in MEMORY_DIRECTORIES
      ]
      return sum(status.f_files - status.f_ffree for status in statuses)
  return 0


class _OutputBuffer:
  """The beginning and the end of an output of any length."""

  def __init__(self, limit: int):
    self._half, self._all = limit // 2, 0
    self._head, self._tail = b'', b''

  def drain(self, stream) -> None:
    """Reads all of a stream, so that its writer never waits."""
    while data := stream.read1(1 << 16):
      self._all += len(data)
      room = self._half - len(self._head)
      self._head, data = self._head + data[:room], data[room:]
      self._tail = (self._tail + data)[-self._half :]

  def text(self) -> str:
    left = self._all - len(self._head) - len(self._tail)
    note = f'\n[{left:,} of {self._all:,} bytes are left out here]\n'
    return (self._head + note.encode() * bool(left) + self._tail).decode(
      errors='replace'
    )
