# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter: system calls that a sandboxed program is refused.

Refused with EPERM are those that make memory which belongs to no process, so
that no limit of a process counts it (memfd_create, shmget, ...), new user
namespaces, and doors into the kernel that programs do without (io_uring, bpf,
ptrace, keyrings, ...). Format: linux/filter.h, linux/seccomp.h.
"""

import platform
import struct

# Numbers of x86_64 and aarch64.
_CALLS = {
  'shmget': (29, 194),
  'shmat': (30, 196),
  'msgget': (68, 186),
  'ptrace': (101, 117),
  'mount': (165, 40),
  'swapon': (167, 224),
  'add_key': (248, 217),
  'request_key': (249, 218),
  'keyctl': (250, 219),
  'unshare': (272, 97),
  'perf_event_open': (298, 241),
  'setns': (308, 268),
  'memfd_create': (319, 279),
  'bpf': (321, 280),
  'userfaultfd': (323, 282),
  'io_uring_setup': (425, 425),
  'io_uring_enter': (426, 426),
  'open_tree': (428, 428),
  'memfd_secret': (447, 447),
}
# AUDIT_ARCH, and which number is its.
_MACHINES = {'x86_64': (0xC000003E, 0), 'aarch64': (0xC00000B7, 1)}
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
  audit, own = _MACHINES[machine]
  numbers = sorted(both[own] for both in _CALLS.values())
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
