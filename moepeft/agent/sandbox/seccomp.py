# SPDX-License-Identifier: Apache-2.0
"""A seccomp filter of the system calls of sandboxed programs.

The filter refuses, with EPERM, calls that create memory outside of processes,
new user namespaces, and kernel interfaces that ordinary programs do not use.
Sockets must be AF_UNIX, other families give EAFNOSUPPORT: a network namespace
does not isolate AF_VSOCK, which reaches the host of a virtual machine, and
AF_ALG, AF_NETLINK and AF_PACKET are large interfaces. A program that can read
the user's directories may not `connect` or create datagram sockets, which send
without it: sockets there, as of tmux or ssh-agent, lead out of the sandbox. The
format is that of linux/filter.h and linux/seccomp.h.
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
# Equal on all machines: io_uring (3), open_tree to fspick, mount_setattr and
# memfd_secret.
_COMMON_NUMBERS = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 447)
# clone must not create a user namespace. A filter cannot read the flags of
# clone3 in memory, so that call is refused with ENOSYS.
_CLONE = {'x86_64': 56, 'aarch64': 220}
_CLONE3, _NEW_USER = 435, 0x10000000
# socket and socketpair.
_SOCKETS = {'x86_64': (41, 53), 'aarch64': (198, 199)}
_CONNECT = {'x86_64': 42, 'aarch64': 203}
_AF_UNIX, _SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_TYPES = 1, 1, 5, 0xF
_LOAD, _EQUAL, _ABOVE, _ANY, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
# Return values; the low bits are an errno: EPERM, ENOSYS, EAFNOSUPPORT.
_VERDICTS = {
  'allow': 0x7FFF0000,
  'kill': 0x80000000,
  'refuse': 0x00050001,
  'no call': 0x00050026,
  'no family': 0x00050061,
}
# The start of x86_64's second set of call numbers (x32).
_X32 = 0x40000000
# Offsets of the architecture, the call number and the low 32 bits of the first
# arguments, which are all that the kernel reads of flags, families and types.
_ARCH, _NUMBER, _FIRST, _SECOND = 4, 0, 16, 24


def program(connects: bool = True) -> bytes:
  """The filter program of this machine for bwrap's --seccomp.

  Args:
    connects: whether sockets may connect; socketpair does not need it.

  Raises:
    ValueError: the machine is not supported.
  """
  machine = platform.machine()
  if machine not in _MACHINES:
    raise ValueError(
      f'there are filters for {" and ".join(_MACHINES)}; this is {machine}'
    )
  architecture, numbers = _MACHINES[machine]
  # (code, target if true, target if false, value); None is the next line.
  instructions = [
    (_LOAD, None, None, _ARCH),
    # Other architectures (32 bits) have other call numbers.
    (_EQUAL, None, 'kill', architecture),
    (_LOAD, None, None, _NUMBER),
    (_ABOVE, 'refuse', None, _X32),
  ]
  if not connects:
    numbers += (_CONNECT[machine],)
  for number in sorted(numbers + _COMMON_NUMBERS):
    instructions.append((_EQUAL, 'refuse', None, number))
  instructions.append((_EQUAL, 'no call', None, _CLONE3))
  for number in _SOCKETS[machine]:
    instructions.append((_EQUAL, 'socket', None, number))
  instructions += [
    (_EQUAL, None, 'allow', _CLONE[machine]),
    (_LOAD, None, None, _FIRST),
    (_ANY, 'refuse', 'allow', _NEW_USER),
  ]
  labels = {'socket': len(instructions)}
  instructions += [
    (_LOAD, None, None, _FIRST),
    (_EQUAL, 'allow' if connects else None, 'no family', _AF_UNIX),
  ]
  if not connects:
    instructions += [
      (_LOAD, None, None, _SECOND),
      (_AND, None, None, _SOCK_TYPES),
      (_EQUAL, 'allow', None, _SOCK_STREAM),
      (_EQUAL, 'allow', 'refuse', _SOCK_SEQPACKET),
    ]
  for name, verdict in _VERDICTS.items():
    labels[name] = len(instructions)
    instructions.append((_RETURN, None, None, verdict))
  return b''.join(
    struct.pack(
      '<HBBI',
      code,
      *(0 if to is None else labels[to] - i - 1 for to in (true, false)),
      value,
    )
    for i, (code, true, false, value) in enumerate(instructions)
  )
