# SPDX-License-Identifier: Apache-2.0
"""Programs in a bubblewrap sandbox, or not at all: code of models, scripts.

A program in it has no network, no home and no environment; it sees the system
and the interpreter read-only, and a work directory of its own in memory, which
is gone afterwards; of the rest only directories that it is given, read-only.
It runs as an unused user id; each process has rlimits, and the time, the memory
and the number of all processes together are limited from outside. It is meant
for programs that models write, which go wrong; the kernel is shared.
"""

import functools
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from moepeft.agent.sandbox import seccomp
from moepeft.agent.sandbox.process import (
  MEMORY_DIRECTORIES,
  ProcessResult,
  ResourceLimits,
  run_limited,
)
from moepeft.agent.tools import Tool, make_tool

# A name that no system has, so that it hides nothing.
_WORK = MEMORY_DIRECTORIES[0]
# Read by the linker, by time zones and by what checks certificates.
_ETC = ('alternatives', 'ld.so.cache', 'ld.so.conf', 'localtime')


class Sandbox:
  """Runs programs within bounds."""

  def __init__(
    self,
    limits: ResourceLimits | None = None,
    unsafe_no_sandbox: bool = False,
    readable: Sequence[str | os.PathLike] = (),
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
  ):
    """Looks whether bubblewrap works here.

    Args:
      limits: of each program.
      unsafe_no_sandbox: run programs as you, with limits of a process alone.
      readable: absolute paths of directories that programs may read.
      environment: variables beside the few that each program has.
      cwd: where programs start, one of `readable`; else the work directory.

    Raises:
      ValueError: it does not work, and nobody said that this is fine.
    """
    self.limits, self.unsafe = limits or ResourceLimits(), unsafe_no_sandbox
    self._readable = tuple(map(os.fspath, readable))
    self._more, self._cwd = dict(environment or {}), cwd
    if not self.unsafe and (why := unavailable_reason()):
      raise ValueError(
        f'programs of the model are run in bubblewrap alone, and {why}; '
        'install it or leave these tools out (--unsafe_no_sandbox runs them as '
        'you, with all that you may do)'
      )

  def python_program(self, code: str) -> ProcessResult:
    """Runs a program of Python."""
    return self.run([sys.executable, '-I', '-X', 'utf8', '-c', code])

  def shell_program(self, code: str) -> ProcessResult:
    """Runs a program of sh."""
    return self.run(['/bin/sh', '-c', code])

  def run(
    self,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
  ) -> ProcessResult:
    """Runs a command, which no shell reads.

    Args:
      command: and its arguments.
      environment: more variables.
      pass_fds: descriptors that it inherits.
    """
    extra_variables = {**self._more, **(environment or {})}
    limited = [*_prlimit(self.limits, not self.unsafe), *command]
    if self.unsafe:
      with tempfile.TemporaryDirectory() as folder:
        variables = {**_environment(folder), **extra_variables}
        cwd = self._cwd or folder
        return run_limited(limited, self.limits, variables, pass_fds, cwd)
    variables = {**_environment(_WORK), **extra_variables}
    with tempfile.TemporaryFile() as filter_file:
      filter_file.write(filter_file.program(connects=not self._readable))
      filter_file.seek(0)
      file = filter_file.fileno()
      box = _bubblewrap_command(
        self.limits, variables, self._readable, self._cwd or _WORK
      )
      command = [
        *box,
        '--seccomp',
        str(file),
        '--',
        *_drop_privileges(),
        *limited,
      ]
      return run_limited(command, self.limits, variables, [file, *pass_fds])


def code_tools(sandbox: Sandbox) -> list[Tool]:
  """run_python and run_shell, in a sandbox."""

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

  seconds = sandbox.limits.seconds + 10
  return [make_tool(run, seconds=seconds) for run in (run_python, run_shell)]


@functools.cache
def unavailable_reason() -> str:
  """The reason why bubblewrap does not work here; '' where it does."""
  if not sys.platform.startswith('linux'):
    return f'it needs Linux, this is {sys.platform}'
  for name in ('bwrap', 'prlimit', 'setpriv'):
    if not shutil.which(name):
      return f'{name} is not installed'
  # A user's own namespace may be forbidden, and in containers often is.
  command = [
    *_bubblewrap_command(ResourceLimits(), _environment(_WORK), (), _WORK),
    '--',
    *_drop_privileges(),
    'true',
  ]
  try:
    seccomp.program()
    completed = subprocess.run(
      command, capture_output=True, text=True, timeout=20
    )
  except (ValueError, OSError, subprocess.SubprocessError) as e:
    return f'it does not start ({e})'
  if completed.returncode:
    return (
      f'it does not start ({completed.stderr.strip() or completed.returncode})'
    )
  return ''


def _bubblewrap_command(
  limits: ResourceLimits,
  environment: Mapping[str, str],
  readable: Sequence[str],
  cwd: str,
) -> list[str]:
  arguments = (
    'bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts '
    '--unshare-cgroup-try --die-with-parent --new-session --clearenv '
    '--hostname sandbox '
  )
  # root stays root until it is nobody; see _dropped.
  root = '--cap-add CAP_SETUID --cap-add CAP_SETGID'
  arguments += root if os.geteuid() == 0 else '--unshare-user --disable-userns'
  arguments = arguments.split()
  for name, value in environment.items():
    arguments += ['--setenv', name, value]
  arguments += ['--ro-bind', '/usr', '/usr']
  for path in ('/bin', '/sbin', '/lib', '/lib32', '/lib64'):
    if os.path.islink(path):
      arguments += ['--symlink', os.readlink(path), path]
    elif os.path.isdir(path):
      arguments += ['--ro-bind', path, path]
  arguments += ['--perms', '0755', '--dir', '/etc']
  for name in _ETC:
    arguments += ['--ro-bind-try', f'/etc/{name}', f'/etc/{name}']
  tmpfs = ['--perms', '1777', '--size', str(limits.disk), '--tmpfs']
  work, temporary, shared = MEMORY_DIRECTORIES
  arguments += [*tmpfs, work, *tmpfs, temporary]
  # After /tmp, below which some may be; what holds others before them.
  created: set[str] = set()
  for path in sorted({*_interpreter_directories(), *readable}):
    if f'{path}/'.startswith('/usr/'):
      continue
    for parent in reversed(pathlib.PurePath(path).parents[:-1]):
      # Which bubblewrap would make for its own user alone.
      if str(parent) not in created:
        arguments += ['--perms', '0755', '--dir', str(parent)]
        created.add(str(parent))
    arguments += ['--ro-bind', path, path]
  arguments += ['--proc', '/proc', '--dev', '/dev', *tmpfs, shared]
  return [*arguments, *'--remount-ro /dev --remount-ro / --chdir'.split(), cwd]


def _interpreter_directories() -> set[str]:
  """Directories of this Python and of the packages that it imports."""
  packages = {
    path
    for path in sys.path
    if os.path.basename(path) in ('site-packages', 'dist-packages')
    and os.path.isdir(path)
  }
  return {sys.prefix, sys.base_prefix, *packages}


def _drop_privileges() -> list[str]:
  """The setpriv command that turns root into a user without rights."""
  if os.geteuid() != 0:
    return []
  # Of his own, so that processes of another sandbox do not count.
  user = 0x70000000 + secrets.randbelow(1 << 24)
  return (
    f'setpriv --reuid={user} --regid={user} --clear-groups --inh-caps=-all '
    '--no-new-privs --'
  ).split()


def _prlimit(limits: ResourceLimits, limit_processes: bool) -> list[str]:
  """prlimit's command; `alone` where no other processes are the user's."""
  # Of a user's other programs the count would be full already.
  count = f'--nproc={limits.processes} ' if limit_processes else ''
  space = limits.address_space or limits.memory
  return (
    f'prlimit --cpu={max(1, round(limits.seconds))} --as={space} '
    f'--fsize={limits.disk} --nofile=256 --core=0 {count}--'
  ).split()


def _environment(home: str) -> dict[str, str]:
  return {
    'HOME': home,
    'LANG': 'C.UTF-8',
    'PATH': '/usr/local/bin:/usr/bin:/bin',
    # A thread a core would be many processes, and much address space.
    'OMP_NUM_THREADS': '1',
    'OPENBLAS_NUM_THREADS': '1',
  }
