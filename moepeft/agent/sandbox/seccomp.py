# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter: system calls that a sandboxed program is refused.

Refused with EPERM are calls that make memory which belongs to no process, new
user namespaces, and interfaces of the kernel that ordinary programs do not use.
Sockets are of AF_UNIX alone, any other family is EAFNOSUPPORT: a network
namespace does not hold AF_VSOCK, which reaches a virtual machine's host, and
AF_ALG, AF_NETLINK and AF_PACKET are large interfaces. A program that sees
directories of the user's is refused `connect`, and sockets of messages, which
send without it: a socket that lies there, as of tmux or of an agent of keys,
leads out of the sandbox. Format: linux/filter.h, linux/seccomp.h.
"""

import platform
import struct

# AUDIT_ARCH, and the numbers of shmget, semget, msgget, ptrace, mount, add_key,
# request_key, keyctl, unshare, perf_event_open, fanotify_init, setns,
# memfd_create, bpf and userfaultfd.
_MACHINES = {
  'x86_64': (
    0xC000003E,
    (29, 64, 68, 101, 165, 248, 249, 250, 272, 298, 300, 308, 319, 321, 323),
  ),
  'aarch64': (
    0xC00000B7,
    (194, 190, 186, 117, 40, 217, 218, 219, 97, 241, 262, 268, 279, 280, 282),
  ),
}
# On all machines: io_uring's three, open_tree to fspick, mount_setattr and
# memfd_secret.
_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 447)
# New processes, of which none may get a user namespace of its own. The flags of
# clone3 lie in memory, where no filter looks: as if there were no such call.
_CLONE = {'x86_64': 56, 'aarch64': 220}
_CLONE3, _NEW_USER = 435, 0x10000000
# socket and socketpair.
_SOCKETS = {'x86_64': (41, 53), 'aarch64': (198, 199)}
_CONNECT = {'x86_64': 42, 'aarch64': 203}
_AF_UNIX, _SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPES = 1, 1, 5, 0xF
_LOAD, _EQUAL, _ABOVE, _ANY, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
# A verdict, its low bits an errno: EPERM, ENOSYS, EAFNOSUPPORT.
_VERDICTS = {
  'allow': 0x7FFF0000,
  'kill': 0x80000000,
  'refuse': 0x00050001,
  'no call': 0x00050026,
  'no family': 0x00050061,
}
# x86_64's other numbers (x32) begin here.
_X32 = 0x40000000
# Where the architecture, the call's number and its first arguments lie; the
# kernel reads flags, families and types as 32 bits, the low half.
_ARCH, _NUMBER, _FIRST, _SECOND = 4, 0, 16, 24


def program(connects: bool = True) -> bytes:
  """The filter for this machine, as bwrap's --seccomp reads it.

  Args:
    connects: whether sockets may reach a path; pairs work without.

  Raises:
    ValueError: the machine is not known.
  """
  machine = platform.machine()
  if machine not in _MACHINES:
    raise ValueError(
      f'there are filters for {" and ".join(_MACHINES)}; this is {machine}'
    )
  audit, numbers = _MACHINES[machine]
  # (code, target where it holds, target where not, value); None is the next.
  lines = [
    (_LOAD, None, None, _ARCH),
    # Of another machine's calls (32 bits) the numbers mean something else.
    (_EQUAL, None, 'kill', audit),
    (_LOAD, None, None, _NUMBER),
    (_ABOVE, 'refuse', None, _X32),
  ]
  if not connects:
    numbers += (_CONNECT[machine],)
  for number in sorted(numbers + _EVERYWHERE):
    lines.append((_EQUAL, 'refuse', None, number))
  lines.append((_EQUAL, 'no call', None, _CLONE3))
  for number in _SOCKETS[machine]:
    lines.append((_EQUAL, 'socket', None, number))
  lines += [
    (_EQUAL, None, 'allow', _CLONE[machine]),
    (_LOAD, None, None, _FIRST),
    (_ANY, 'refuse', 'allow', _NEW_USER),
  ]
  labels = {'socket': len(lines)}
  lines += [
    (_LOAD, None, None, _FIRST),
    (_EQUAL, 'allow' if connects else None, 'no family', _AF_UNIX),
  ]
  if not connects:
    lines += [
      (_LOAD, None, None, _SECOND),
      (_AND, None, None, _SOCK_TYPES),
      (_EQUAL, 'allow', None, _SOCK_STREAM),
      (_EQUAL, 'allow', 'refuse', _SOCK_SEQPACKET),
    ]
  for name, verdict in _VERDICTS.items():
    labels[name] = len(lines)
    lines.append((_RETURN, None, None, verdict))
  return b''.join(
    struct.pack(
      '<HBBI',
      code,
      *(0 if to is None else labels[to] - at - 1 for to in (true, false)),
      value,
    )
    for at, (code, true, false, value) in enumerate(lines)
  )
