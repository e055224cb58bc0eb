# SPDX-License-Identifier: Apache-2.0
"""Code and shell tools that run in a bubblewrap sandbox, or not at all.

A program in it has no network, no home and no environment; it sees the system
and the interpreter read-only, and a work directory of its own in memory, which
is gone afterwards. What contains it:

- namespaces of its own (processes, network, users, ...), ended as a whole;
- another user: as root, one that nobody is (root's limits do not bind);
- rlimits of a process: memory, time, sizes and number of files, and the number
  of processes of that user, which Linux 5.14 counts in a user namespace by
  itself (on older ones the user's other processes count too);
- a watch from outside of the memory of all its processes together, every
  tenth of a second, and of the time;
- sizes of its file systems, and a filter against memory that is of no process.

It is made for programs that models write, which go wrong; the kernel is shared.
"""

import functools
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from moepeft.agent import filters
from moepeft.agent.programs import Bounds, Ran, watched
from moepeft.agent.tools import Tool, tool

# A name that no system has, so that it hides nothing.
_WORK = '/sandbox'
# Read by the linker, by time zones and by what checks certificates.
_ETC = ('alternatives', 'ld.so.cache', 'ld.so.conf', 'localtime')
_TOOLS = ('bwrap', 'prlimit', 'setpriv')


class Sandbox:
  """Runs programs within bounds."""

  def __init__(
    self,
    bounds: Bounds | None = None,
    python: str = sys.executable,
    unsafe_no_sandbox: bool = False,
  ):
    """Looks whether bubblewrap works here.

    Args:
      bounds: of each program.
      python: the interpreter; it and its packages are seen read-only.
      unsafe_no_sandbox: run programs as you, with limits of a process alone.

    Raises:
      ValueError: it does not work, and nobody said that this is fine.
    """
    self.bounds, self.python = bounds or Bounds(), python
    self.unsafe = unsafe_no_sandbox
    if not self.unsafe and (why := unusable()):
      raise ValueError(
        f'programs of the model are run in bubblewrap alone, and {why}; '
        'install it or leave these tools out (--unsafe_no_sandbox runs them as '
        'you, with all that you may do)'
      )

  def python_program(self, code: str) -> Ran:
    """Runs a program of Python."""
    return self._run(code, 'program.py', [self.python, '-I', '-X', 'utf8'])

  def shell_program(self, code: str) -> Ran:
    """Runs a program of sh."""
    return self._run(code, 'program.sh', ['/bin/sh'])

  def _run(self, code: str, name: str, command: Sequence[str]) -> Ran:
    if self.unsafe:
      with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        with open(path, 'w', encoding='utf-8') as file:
          file.write(code)
        limited = [*_limits(self.bounds, False), *command, path]
        return watched(limited, self.bounds, _environment(folder), cwd=folder)
    with (
      _passed(code.encode()) as program,
      _passed(filters.program()) as seccomp,
    ):
      path = f'/{name}'
      wrapped = [
        *_bubblewrap(self.bounds, self.python),
        '--seccomp',
        str(seccomp.fileno()),
        '--perms',
        '0444',
        '--ro-bind-data',
        str(program.fileno()),
        path,
        '--remount-ro',
        '/',
        '--',
        *_dropped(),
        *_limits(self.bounds, True),
        *command,
        path,
      ]
      passed = (program.fileno(), seccomp.fileno())
      return watched(wrapped, self.bounds, _environment(_WORK), passed)


def tools(sandbox: Sandbox) -> list[Tool]:
  """run_python and run_shell, in a sandbox."""
  seconds = sandbox.bounds.seconds + 10

  def run_python(code: str) -> str:
    """Runs a Python program and returns what it prints. No network; files that
    it writes are gone afterwards.

    Args:
      code: the whole program; print what you want to see.
    """
    return str(sandbox.python_program(code))

  def run_shell(command: str) -> str:
    """Runs a program of sh and returns what it prints. No network; files that
    it writes are gone afterwards.

    Args:
      command: one or more lines.
    """
    return str(sandbox.shell_program(command))

  return [tool(run, seconds=seconds) for run in (run_python, run_shell)]


@functools.cache
def unusable() -> str:
  """Why there can be no sandbox here, for a sentence; '' where there can."""
  if not sys.platform.startswith('linux'):
    return f'it needs Linux, this is {sys.platform}'
  for name in _TOOLS:
    if not shutil.which(name):
      return f'{name} is not installed'
  try:
    filters.program()
  except ValueError as e:
    return str(e)
  # A user's own namespace may be forbidden, and in containers often is.
  tried = [*_bubblewrap(Bounds(), sys.executable), '--', *_dropped(), 'true']
  try:
    done = subprocess.run(tried, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.SubprocessError) as e:
    return f'it does not start ({e})'
  if done.returncode:
    return f'it does not start ({done.stderr.strip() or done.returncode})'
  return ''


def _bubblewrap(bounds: Bounds, python: str) -> list[str]:
  made = [
    'bwrap',
    *('--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts'),
    *('--unshare-cgroup-try', '--die-with-parent', '--new-session'),
    *('--clearenv', '--hostname', 'sandbox'),
  ]
  if os.geteuid() == 0:
    # Until it is nobody; see _dropped.
    made += ['--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
  else:
    made += ['--unshare-user', '--disable-userns']
  for name, value in _environment(_WORK).items():
    made += ['--setenv', name, value]
  made += ['--ro-bind', '/usr', '/usr']
  for name in ('bin', 'sbin', 'lib', 'lib32', 'lib64'):
    if os.path.islink(f'/{name}'):
      made += ['--symlink', os.readlink(f'/{name}'), f'/{name}']
    elif os.path.isdir(f'/{name}'):
      made += ['--ro-bind', f'/{name}', f'/{name}']
  made += ['--perms', '0755', '--dir', '/etc']
  for name in _ETC:
    made += ['--ro-bind-try', f'/etc/{name}', f'/etc/{name}']
  size = str(bounds.disk)
  for path in (_WORK, '/tmp'):
    made += ['--perms', '1777', '--size', size, '--tmpfs', path]
  # After /tmp, below which an interpreter may be.
  for path in _prefixes(python):
    for parent in reversed(pathlib.PurePath(path).parents[:-1]):
      # Which bubblewrap would make for its own user alone.
      if str(parent) not in made:
        made += ['--perms', '0755', '--dir', str(parent)]
    made += ['--ro-bind', path, path]
  made += ['--proc', '/proc', '--dev', '/dev']
  made += ['--perms', '1777', '--size', size, '--tmpfs', '/dev/shm']
  return [*made, '--remount-ro', '/dev', '--chdir', _WORK]


def _prefixes(python: str) -> list[str]:
  """Folders that an interpreter needs beside /usr."""
  if python == sys.executable:
    found = {sys.prefix, sys.base_prefix}
  else:
    found = {os.path.dirname(os.path.dirname(os.path.realpath(python)))}
  return sorted(p for p in found if not f'{p}/'.startswith('/usr/'))


def _dropped() -> list[str]:
  """What makes root somebody without rights, whom no file belongs to."""
  if os.geteuid() != 0:
    return []
  # Of his own, so that processes of another sandbox do not count.
  user = str(0x70000000 + secrets.randbelow(1 << 24))
  return [
    'setpriv',
    f'--reuid={user}',
    f'--regid={user}',
    '--clear-groups',
    '--inh-caps=-all',
    '--no-new-privs',
    '--',
  ]


def _limits(bounds: Bounds, alone: bool) -> list[str]:
  """prlimit's command; `alone` where no other processes are the user's."""
  made = [
    'prlimit',
    f'--cpu={max(1, round(bounds.seconds))}',
    f'--as={bounds.memory}',
    f'--fsize={bounds.disk}',
    '--nofile=256',
    '--core=0',
  ]
  # Of a user's other programs the count would be full already.
  made += [f'--nproc={bounds.processes}'] if alone else []
  return [*made, '--']


def _passed(data: bytes):
  """A file in memory that a child may read from its beginning."""
  file = tempfile.TemporaryFile()
  file.write(data)
  file.seek(0)
  return file


def _environment(home: str) -> dict[str, str]:
  return {
    'HOME': home,
    'LANG': 'C.UTF-8',
    'PATH': '/usr/local/bin:/usr/bin:/bin',
    # A thread a core would be many processes, and much address space.
    'OMP_NUM_THREADS': '1',
    'OPENBLAS_NUM_THREADS': '1',
  }
