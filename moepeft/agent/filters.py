# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter: system calls that a sandboxed program is refused.

Refused with EPERM are those that make memory which belongs to no process, so
that no limit of a process counts it (memfd_create, shmget, ...), new user
namespaces, and doors into the kernel that programs do without (io_uring, bpf,
ptrace, keyrings, ...). Format: linux/filter.h, linux/seccomp.h.
"""

import platform
import struct

# (AUDIT_ARCH, {call: number}); numbers from 424 on are every machine's.
_MACHINES = {
  'x86_64': (
    0xC000003E,
    dict(
      shmget=29,
      shmat=30,
      ptrace=101,
      msgget=68,
      mount=165,
      swapon=167,
      add_key=248,
      request_key=249,
      keyctl=250,
      unshare=272,
      perf_event_open=298,
      setns=308,
      memfd_create=319,
      bpf=321,
      userfaultfd=323,
    ),
  ),
  'aarch64': (
    0xC00000B7,
    dict(
      shmget=194,
      shmat=196,
      ptrace=117,
      msgget=186,
      mount=40,
      swapon=224,
      add_key=217,
      request_key=218,
      keyctl=219,
      unshare=97,
      perf_event_open=241,
      setns=268,
      memfd_create=279,
      bpf=280,
      userfaultfd=282,
    ),
  ),
}
_EVERYWHERE = dict(
  io_uring_setup=425, io_uring_enter=426, open_tree=428, memfd_secret=447
)
_LOAD, _EQUAL, _ABOVE, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001
# x86_64's other numbers (x32) begin here.
_X32 = 0x40000000


def program() -> bytes:
  """The filter for this machine, as bwrap's --seccomp reads it.

  Raises:
    ValueError: the machine is not known.
  """
  machine = platform.machine()
  if machine not in _MACHINES:
    raise ValueError(
      f'the sandbox has filters for {" and ".join(_MACHINES)}; this is '
      f'{machine}'
    )
  audit, named = _MACHINES[machine]
  numbers = sorted({**named, **_EVERYWHERE}.values())
  lines = [
    (_LOAD, 0, 0, 4),
    # Of another machine's calls (32 bits) the numbers mean something else.
    (_EQUAL, 1, 0, audit),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, 0),
    (_ABOVE, len(numbers) + 1, 0, _X32),
  ]
  for i, number in enumerate(numbers):
    lines.append((_EQUAL, len(numbers) - i, 0, number))
  lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
  return b''.join(struct.pack('<HBBI', *line) for line in lines)
