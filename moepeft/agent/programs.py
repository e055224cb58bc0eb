# SPDX-License-Identifier: Apache-2.0
"""Programs that are run and watched: time, memory, and how much they print."""

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Of a program and all that it starts.

  Attributes:
    seconds: on the wall, together; and of CPU, each process.
    memory: bytes, each process and all together.
    processes: and threads, at once.
    disk: bytes of the work directory, and of each file.
    output: bytes that are kept, the beginning and the end.
  """

  seconds: float = 30.0
  memory: int = 1 << 30
  processes: int = 64
  disk: int = 64 << 20
  output: int = 20_000


@dataclasses.dataclass(frozen=True)
class Ran:
  """What came of a program.

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
    said = self.output.rstrip('\n')
    note = f'[{ended}]' if ended else '' if said else '[no output]'
    return '\n'.join(filter(None, [said, note]))


def watched(
  command: Sequence[str],
  bounds: Bounds,
  environment: Mapping[str, str],
  passed: Sequence[int] = (),
  cwd: str | None = None,
) -> Ran:
  """Runs a command until it ends, or is ended for what it uses.

  Args:
    command: and its arguments; no shell reads them.
    bounds: of these the time, the memory and the output are held here.
    environment: all of it.
    passed: files that it inherits.
    cwd: where it runs; None is here.
  """
  process = subprocess.Popen(
    command,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    pass_fds=passed,
    cwd=cwd,
    env=dict(environment),
    start_new_session=True,
  )
  kept = _Kept(bounds.output)
  reader = threading.Thread(
    target=kept.drain, args=(process.stdout,), daemon=True
  )
  reader.start()
  try:
    ended = _wait(process, bounds)
  finally:
    # The sandbox ends with bwrap; without one, the session does.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, 9)
    process.kill()
    process.wait()
    reader.join(5)
  return Ran(kept.text(), None if ended else process.returncode, ended)


def _wait(process: subprocess.Popen, bounds: Bounds) -> str:
  """Why a process has to be ended; '' once it has ended by itself."""
  begun = time.monotonic()
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(0.1)
      return ''
    if time.monotonic() - begun > bounds.seconds:
      return f'ended after {bounds.seconds:.3g} s'
    if (used := _memory(process.pid)) > bounds.memory:
      return (
        f'ended: all its processes together had {used >> 20:,} MB of memory, '
        f'{bounds.memory >> 20:,} are allowed'
      )


def _memory(pid: int) -> int:
  """Bytes that a process and all its descendants hold, files aside."""
  held, below = {}, {}
  for name in filter(str.isdigit, os.listdir('/proc')):
    with contextlib.suppress(OSError, ValueError, KeyError):
      with open(f'/proc/{name}/status') as lines:
        said = dict(line.split(':', 1) for line in lines)
      below.setdefault(int(said['PPid']), []).append(int(name))
      held[int(name)] = sum(
        int(said[key].split()[0]) for key in ('RssAnon', 'RssShmem')
      )
  total, left = 0, [pid]
  while left:
    total += held.get(own := left.pop(), 0)
    left += below.get(own, [])
  return 1024 * total


class _Kept:
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
