# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter: system calls that a sandboxed program is refused.

Refused with EPERM are those that make memory which belongs to no process, so
that no limit counts it, new user namespaces, and doors into the kernel that
programs do without. Format: linux/filter.h, linux/seccomp.h.
"""

import platform
import struct

# AUDIT_ARCH, and the numbers of shmget, msgget, ptrace, mount, add_key,
# request_key, keyctl, unshare, perf_event_open, setns, memfd_create, bpf and
# userfaultfd; then, on all machines, io_uring's two, open_tree to fspick,
# mount_setattr and memfd_secret.
_MACHINES = {
  'x86_64': (
    0xC000003E,
    (29, 68, 101, 165, 248, 249, 250, 272, 298, 308, 319, 321, 323),
  ),
  'aarch64': (
    0xC00000B7,
    (194, 186, 117, 40, 217, 218, 219, 97, 241, 268, 279, 280, 282),
  ),
}
_EVERYWHERE = (425, 426, 428, 429, 430, 431, 432, 433, 442, 447)
# New processes, of which none may get a user namespace of its own. The flags of
# clone3 lie in memory, where no filter looks: as if there were no such call.
_CLONE = {'x86_64': 56, 'aarch64': 220}
_CLONE3, _NEW_USER = 435, 0x10000000
_LOAD, _EQUAL, _ABOVE, _ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001
_NO_SUCH = 0x00050026
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
      f'there are filters for {" and ".join(_MACHINES)}; this is {machine}'
    )
  audit, numbers = _MACHINES[machine]
  numbers = sorted(numbers + _EVERYWHERE)
  lines = [
    (_LOAD, 0, 0, 4),
    # Of another machine's calls (32 bits) the numbers mean something else.
    (_EQUAL, 1, 0, audit),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, 0),
    (_ABOVE, len(numbers) + 5, 0, _X32),
  ]
  for i, number in enumerate(numbers):
    lines.append((_EQUAL, len(numbers) + 4 - i, 0, number))
  lines += [
    (_EQUAL, 5, 0, _CLONE3),
    (_EQUAL, 0, 2, _CLONE[machine]),
    (_LOAD, 0, 0, 16),
    (_ANY, 1, 0, _NEW_USER),
    (_RETURN, 0, 0, _ALLOW),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _NO_SUCH),
  ]
  return b''.join(struct.pack('<HBBI', *line) for line in lines)
