# SPDX-License-Identifier: Apache-2.0
"""Runs programs of models and scripts in a bubblewrap sandbox.

A program has no network, no home and no environment variables of the user. It
can read the system, the interpreter and given directories, and write to a
temporary work directory in memory. It runs as an unused user id. Each process
has rlimits, and time, memory and number of all processes together are limited.
The sandbox protects from faulty programs; the kernel is shared.
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

# A directory that does not exist outside of the sandbox.
_WORK_DIR = MEMORY_DIRECTORIES[0]
# Files in /etc for the linker, time zones and alternatives.
_ETC = ('alternatives', 'ld.so.cache', 'ld.so.conf', 'localtime')


class Sandbox:
  """Runs programs within limits."""

  def __init__(
    self,
    limits: ResourceLimits | None = None,
    unsafe_no_sandbox: bool = False,
    readable: Sequence[str | os.PathLike] = (),
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
  ):
    """Checks that bubblewrap works.

    Args:
      limits: the limits of each program.
      unsafe_no_sandbox: whether to run programs as the current user, with
        rlimits only.
      readable: absolute paths of directories that programs can read.
      environment: additional environment variables.
      cwd: the working directory, one of `readable`; else the work directory.

    Raises:
      ValueError: bubblewrap does not work, and unsafe_no_sandbox is False.
    """
    self.limits, self.unsafe = limits or ResourceLimits(), unsafe_no_sandbox
    self._readable = tuple(map(os.fspath, readable))
    self._extra_environment, self._cwd = dict(environment or {}), cwd
    if not self.unsafe and (why := unavailable_reason()):
      raise ValueError(
        f'programs of the model need bubblewrap, but {why}; install it or '
        'leave these tools out (--unsafe_no_sandbox runs them as your user, '
        'with all your rights)'
      )

  def python_program(self, code: str) -> ProcessResult:
    """Runs a Python program."""
    return self.run([sys.executable, '-I', '-X', 'utf8', '-c', code])

  def shell_program(self, code: str) -> ProcessResult:
    """Runs a shell program."""
    return self.run(['/bin/sh', '-c', code])

  def run(
    self,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
  ) -> ProcessResult:
    """Runs a command without a shell.

    Args:
      command: the program and its arguments.
      environment: additional environment variables.
      pass_fds: file descriptors that the program inherits.
    """
    extra_variables = {**self._extra_environment, **(environment or {})}
    limited_command = [*_prlimit(self.limits, not self.unsafe), *command]
    if self.unsafe:
      with tempfile.TemporaryDirectory() as folder:
        variables = {**_environment(folder), **extra_variables}
        cwd = self._cwd or folder
        return run_limited(
          limited_command, self.limits, variables, pass_fds, cwd
        )
    variables = {**_environment(_WORK_DIR), **extra_variables}
    with tempfile.TemporaryFile() as filter_file:
      filter_file.write(seccomp.program(connects=not self._readable))
      filter_file.seek(0)
      descriptor = filter_file.fileno()
      sandbox_command = _bubblewrap_command(
        self.limits, variables, self._readable, self._cwd or _WORK_DIR
      )
      command = [
        *sandbox_command,
        '--seccomp',
        str(descriptor),
        '--',
        *_drop_privileges(),
        *limited_command,
      ]
      return run_limited(
        command, self.limits, variables, [descriptor, *pass_fds]
      )


def code_tools(sandbox: Sandbox) -> list[Tool]:
  """Makes the tools run_python and run_shell."""

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
  """The reason why bubblewrap does not work; '' if it works."""
  if not sys.platform.startswith('linux'):
    return f'it needs Linux, this is {sys.platform}'
  for name in ('bwrap', 'prlimit', 'setpriv'):
    if not shutil.which(name):
      return f'{name} is not installed'
  # User namespaces may be forbidden, for example in containers.
  command = [
    *_bubblewrap_command(
      ResourceLimits(), _environment(_WORK_DIR), (), _WORK_DIR
    ),
    '--',
    *_drop_privileges(),
    'true',
  ]
  try:
    seccomp.program()
    process = subprocess.run(
      command, capture_output=True, text=True, timeout=20
    )
  except (ValueError, OSError, subprocess.SubprocessError) as e:
    return f'it does not start ({e})'
  if process.returncode:
    return f'it does not start ({process.stderr.strip() or process.returncode})'
  return ''


def _bubblewrap_command(
  limits: ResourceLimits,
  environment: Mapping[str, str],
  readable: Sequence[str],
  cwd: str,
) -> list[str]:
  flags = (
    'bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts '
    '--unshare-cgroup-try --die-with-parent --new-session --clearenv '
    '--hostname sandbox '
  )
  # root needs capabilities to change its user; see _drop_privileges.
  root = '--cap-add CAP_SETUID --cap-add CAP_SETGID'
  flags += root if os.geteuid() == 0 else '--unshare-user --disable-userns'
  flags = flags.split()
  for name, value in environment.items():
    flags += ['--setenv', name, value]
  flags += ['--ro-bind', '/usr', '/usr']
  for path in ('/bin', '/sbin', '/lib', '/lib32', '/lib64'):
    if os.path.islink(path):
      flags += ['--symlink', os.readlink(path), path]
    elif os.path.isdir(path):
      flags += ['--ro-bind', path, path]
  flags += ['--perms', '0755', '--dir', '/etc']
  for name in _ETC:
    flags += ['--ro-bind-try', f'/etc/{name}', f'/etc/{name}']
  tmpfs = ['--perms', '1777', '--size', str(limits.disk), '--tmpfs']
  work, temporary, shared = MEMORY_DIRECTORIES
  flags += [*tmpfs, work, *tmpfs, temporary]
  # After /tmp, which may contain some of them; parents before children.
  created: set[str] = set()
  for path in sorted({*_interpreter_directories(), *readable}):
    if f'{path}/'.startswith('/usr/'):
      continue
    for parent in reversed(pathlib.PurePath(path).parents[:-1]):
      # bubblewrap would create it without permissions for other users.
      if str(parent) not in created:
        flags += ['--perms', '0755', '--dir', str(parent)]
        created.add(str(parent))
    flags += ['--ro-bind', path, path]
  flags += ['--proc', '/proc', '--dev', '/dev', *tmpfs, shared]
  return [*flags, *'--remount-ro /dev --remount-ro / --chdir'.split(), cwd]


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
  """The setpriv command that changes root to a user without privileges."""
  if os.geteuid() != 0:
    return []
  # A random id, as --nproc counts all processes of a user.
  uid = 0x70000000 + secrets.randbelow(1 << 24)
  return (
    f'setpriv --reuid={uid} --regid={uid} --clear-groups --inh-caps=-all '
    '--no-new-privs --'
  ).split()


def _prlimit(limits: ResourceLimits, limit_processes: bool) -> list[str]:
  """The prlimit command; limits processes if the user has no others."""
  # --nproc counts all processes of a user.
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
    # Threads count as processes and need address space.
    'OMP_NUM_THREADS': '1',
    'OPENBLAS_NUM_THREADS': '1',
  }
