# SPDX-License-Identifier: Apache-2.0
"""Runs a program with limits on time, memory, processes and output."""

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from moepeft.agent.sandbox import cgroup

# Mount points of the sandbox's tmpfs file systems. /sandbox, the first one,
# exists only inside of a sandbox.
MEMORY_DIRECTORIES = ('/sandbox', '/tmp', '/dev/shm')
# Kernel memory of one directory entry in a tmpfs: inode, dentry and name.
_BYTES_PER_ENTRY = 1024


@dataclasses.dataclass(frozen=True)
class ResourceLimits:
  """Limits on a program and its descendant processes.

  Attributes:
    seconds: limit on the wall-clock time of the program, and on the CPU time of
      each process.
    memory: limit on the memory of all processes together, in bytes; it includes
      kernel memory that is allocated for them.
    address_space: limit on the virtual memory of each process, in bytes; None
      for `memory`.
    processes: limit on the number of processes and threads that run at once.
    disk: limit on the size of the work directory, and of each file, in bytes.
    output: limit on the captured output, in bytes; the middle of a longer
      output is omitted.
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
    output: standard output and standard error, interleaved.
    exit_code: the exit status; None if the program was killed or did not start.
    kill_reason: a message that says why the program was killed or did not
      start; '' if it exited by itself.
  """

  output: str
  exit_code: int | None
  kill_reason: str = ''

  def __str__(self) -> str:
    status = self.kill_reason or (
      self.exit_code and f'exit status {self.exit_code}'
    )
    output = self.output.rstrip('\n')
    last_line = f'[{status}]' if status else '' if output else '[no output]'
    return '\n'.join(filter(None, [output, last_line]))


def run_limited(
  command: Sequence[str],
  limits: ResourceLimits,
  environment: Mapping[str, str],
  pass_fds: Sequence[int] = (),
  cwd: str | None = None,
) -> ProcessResult:
  """Runs a command until it exits, and kills it if it exceeds a limit.

  Args:
    command: the program and its arguments. No shell interprets them.
    limits: the limits. This function enforces those on wall-clock time, memory,
      processes and output; the command has to enforce the others.
    environment: the complete environment of the program.
    pass_fds: file descriptors that the program inherits.
    cwd: the working directory; None for the current one.
  """
  group = cgroup.create_group(limits.memory, limits.processes)
  try:
    command = group.wrap(list(command)) if group else command
    return _run(command, limits, environment, pass_fds, cwd, group)
  finally:
    if group:
      group.close()


def _run(command, limits, environment, pass_fds, cwd, group) -> ProcessResult:
  machine_memory = cgroup.MachineMemory()
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
    # An argument is too long, or contains a NUL or an unpaired surrogate.
    return ProcessResult('', None, f'it does not start: {e}')
  buffer = _OutputBuffer(limits.output)
  reader = threading.Thread(
    target=buffer.drain, args=(process.stdout,), daemon=True
  )
  reader.start()
  try:
    kill_reason = _wait(process, limits, group, machine_memory)
  finally:
    # With bwrap, all processes of the sandbox die with it. Without bwrap, the
    # processes of the session have to be killed.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, 9)
    process.kill()
    process.wait()
    reader.join(5)
  if not kill_reason and group and group.was_oom_killed():
    kill_reason = (
      f'killed: it used more than {limits.memory >> 20:,} MB of memory'
    )
  return ProcessResult(
    buffer.text(), None if kill_reason else process.returncode, kill_reason
  )


def _wait(
  process,
  limits: ResourceLimits,
  group,
  machine_memory: cgroup.MachineMemory,
) -> str:
  """Waits until a process exits or exceeds a limit.

  Returns:
    The reason to kill the process; '' if it has exited by itself.
  """
  start = time.monotonic()
  limit_text = f'the limit is {limits.memory >> 20:,} MB'
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(0.1)
      return ''
    if time.monotonic() - start > limits.seconds:
      return f'killed after {limits.seconds:.3g} s'
    used, threads = _memory_and_threads(process.pid)
    if used > limits.memory:
      return (
        f'killed: all its processes together used {used >> 20:,} MB of memory, '
        f'{limit_text}'
      )
    if threads > limits.processes + cgroup.HELPER_PROCESSES:
      return (
        f'killed: it had {threads} processes and threads, the limit is '
        f'{limits.processes}'
      )
    # Without a control group, kernel memory can only be measured for the whole
    # machine, together with that of other programs.
    if not group and (grown := machine_memory.growth()) + used > limits.memory:
      return (
        f'killed: its processes used {used >> 20:,} MB of memory, and kernel '
        'memory (buffers of sockets and pipes, tmpfs files) grew by '
        f'{grown >> 20:,} MB on this machine, {limit_text}'
      )
    if machine_memory.is_low():
      return 'killed: the machine is low on memory'


def _memory_and_threads(pid: int) -> tuple[int, int]:
  """Memory in bytes and thread count of a process and its descendants.

  The memory is private memory, including swapped pages, and the memory of tmpfs
  directory entries. The kernel counts directory entries as reclaimable memory,
  although those of a tmpfs cannot be reclaimed.
  """
  private_kb, threads, children = {}, {}, {}
  for name in filter(str.isdigit, os.listdir('/proc')):
    with contextlib.suppress(OSError, ValueError, KeyError):
      with open(f'/proc/{name}/status') as lines:
        status = dict(line.split(':', 1) for line in lines)
      children.setdefault(int(status['PPid']), []).append(int(name))
      private_kb[int(name)] = sum(
        int(status[key].split()[0]) for key in ('RssAnon', 'VmSwap')
      )
      threads[int(name)] = int(status['Threads'])
  pids, pending = set(), [pid]
  while pending:
    pids.add(parent := pending.pop())
    pending += set(children.get(parent, ())) - pids
  return (
    1024 * sum(private_kb.get(pid, 0) for pid in pids)
    + _BYTES_PER_ENTRY * _count_tmpfs_entries(pids),
    sum(threads.get(pid, 0) for pid in pids),
  )


def _count_tmpfs_entries(pids: Iterable[int]) -> int:
  """Number of files and links in the sandbox's tmpfs file systems."""
  for pid in pids:
    # The directories do not exist for a process outside of the sandbox.
    with contextlib.suppress(OSError):
      statuses = [
        os.statvfs(f'/proc/{pid}/root{path}') for path in MEMORY_DIRECTORIES
      ]
      return sum(status.f_files - status.f_ffree for status in statuses)
  return 0


class _OutputBuffer:
  """Captures the start and the end of an output stream of any length."""

  def __init__(self, limit: int):
    self._half_limit, self._total = limit // 2, 0
    self._head, self._tail = b'', b''

  def drain(self, stream) -> None:
    """Reads a stream to its end, so that the writing process never blocks."""
    while data := stream.read1(1 << 16):
      self._total += len(data)
      room = self._half_limit - len(self._head)
      self._head, data = self._head + data[:room], data[room:]
      self._tail = (self._tail + data)[-self._half_limit :]

  def text(self) -> str:
    omitted = self._total - len(self._head) - len(self._tail)
    note = f'\n[{omitted:,} of {self._total:,} bytes are left out here]\n'
    return (self._head + note.encode() * bool(omitted) + self._tail).decode(
      errors='replace'
    )
