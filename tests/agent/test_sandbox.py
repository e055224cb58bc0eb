# SPDX-License-Identifier: Apache-2.0
"""Programs of the model stay within the sandbox. Each test bounds itself too.

A program stops by itself (`signal.alarm`) long before it could do harm, should
the sandbox not hold: what it would use is a stand-in far below the machine's.
"""

import io
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

import pytest

pytest.importorskip('openai')

from moepeft.agent.agent import Agent  # noqa: E402
from moepeft.agent.sandbox import (
  bubblewrap,  # noqa: E402
  cgroup,
  process,
  seccomp,
)
from moepeft.agent.sandbox.bubblewrap import Sandbox  # noqa: E402
from moepeft.agent.sandbox.process import ResourceLimits  # noqa: E402
from tests import ROOT
from tests.agent.scripted import serving, text_reply, wants  # noqa: E402

MB = 1 << 20
BOUNDS = ResourceLimits(
  seconds=40, memory=200 * MB, processes=24, disk=4 * MB, output=4000
)


@pytest.fixture
def box():
  if why := bubblewrap.unavailable_reason():
    pytest.skip(f'no sandbox here: {why}')

  def late(*_):
    raise TimeoutError('the sandbox did not end its program')

  # Whatever hangs fails, and does not stay.
  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(90)
  yield Sandbox(BOUNDS)
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def descendants() -> set[str]:
  """Names of processes that have a marked argument."""
  paths = set()
  for name in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{name}/cmdline', 'rb') as file:
        if b'moepeft_marked' in file.read():
          paths.add(name)
    except OSError:
      pass
  return paths


def test_a_program_runs_and_says_how_it_ended(box):
  ran = box.python_program('import numpy, sys\nprint(numpy.arange(4).sum())')
  assert (ran.output, ran.exit_code, ran.kill_reason) == ('6\n', 0, '')
  ran = box.shell_program('echo out; echo err >&2; exit 3')
  assert (ran.output, ran.exit_code) == ('out\nerr\n', 3)
  assert str(ran) == 'out\nerr\n[exit status 3]'
  assert 'ZeroDivisionError' in str(box.python_program('1 / 0'))
  assert str(box.python_program('')) == '[no output]'


def test_homes_and_other_files_are_not_seen(box, tmp_path, monkeypatch):
  monkeypatch.setenv('MY_API_KEY', 'the secret')
  secret = tmp_path / 'secret.txt'
  secret.write_text('the secret')
  secret.chmod(0o644)
  home = os.path.expanduser('~')
  ran = box.python_program(f"""
import os, sys
for path in ({str(secret)!r}, '/etc/shadow', '/etc/passwd'):
  try:
    print('READ', path, open(path).read()[:20])
  except OSError as e:
    print(type(e).__name__)
for home in ({home!r}, '/home', '/root'):
  for folder, names, files in os.walk(home):
    # Of a home only what the interpreter needs.
    inside = any(folder.startswith(p) for p in (sys.prefix, sys.base_prefix))
    if files and not inside:
      print('READ', folder, files)
    names[:] = [] if inside else names
try:
  # An ordinary user's first process is the sandbox's, and his.
  print(open('/proc/1/environ').read().replace('THREADS', ''))
except OSError:
  pass
print(os.environ['HOME'], os.getcwd())
print(sorted(k for k in os.environ if 'KEY' in k or 'TOKEN' in k))
""")
  assert 'READ' not in ran.output and 'the secret' not in ran.output
  assert ran.output.endswith('/sandbox /sandbox\n[]\n')


def test_nothing_outside_is_written_and_the_work_directory_is_fresh(
  box, tmp_path
):
  tmp_path.chmod(0o777)
  ran = box.python_program(f"""
for path in ('/x', '/usr/x', '/etc/x', '/dev/x', '/proc/sys/kernel/hostname',
             {str(tmp_path / 'x')!r}, {str(bubblewrap.__file__)!r}):
  try:
    open(path, 'w').write('x')
    print('WROTE', path)
  except OSError as e:
    print(type(e).__name__)
open('here', 'w').write('x')
open('/tmp/here', 'w').write('x')
print('done')
""")
  assert 'WROTE' not in ran.output and ran.output.endswith('done\n')
  assert list(tmp_path.iterdir()) == []
  # Of /tmp, only the way to an interpreter that is there itself.
  roots = (pathlib.Path(p).parts for p in (sys.prefix, sys.base_prefix))
  way = {parts[2] for parts in roots if parts[1] == 'tmp'}
  output = str(box.shell_program('ls -A . /tmp')).split()
  assert set(output) == {'.:', '/tmp:', *way}


def test_there_is_no_network(box):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    ran = box.python_program(f"""
import socket
for host in ('127.0.0.1', '1.1.1.1'):
  try:
    socket.create_connection((host, {port}), timeout=2)
    print('CONNECTED', host)
  except OSError as e:
    print(type(e).__name__)
""")
    server.settimeout(0.05)
    with pytest.raises(TimeoutError):
      server.accept()
  # There are no sockets of the internet at all.
  assert ran.output == 'OSError\nOSError\n'


def test_five_hundred_processes_are_contained(box):
  before = time.monotonic()
  ran = box.python_program("""
import os, time
made = 0
for _ in range(500):
  try:
    if os.fork() == 0:
      time.sleep(5)
      os._exit(0)
    made += 1
  except OSError:
    break
print('made', made)
""")
  assert ran.exit_code == 0
  command = int(ran.output.split()[1])
  # 24, less the program itself.
  assert 10 < command < 24
  # They end with it: nobody waits for the five seconds of sleep twice.
  assert time.monotonic() - before < 40


def test_processes_left_behind_end_with_their_program(box):
  ran = box.shell_program(
    'for i in 1 2 3; do setsid sh -c "sleep 77; : moepeft_marked" & done; '
    'sleep 0.3; echo done'
  )
  assert ran.output == 'done\n'
  for _ in range(50):
    if not descendants():
      break
    time.sleep(0.1)
  assert descendants() == set()


def test_a_process_that_allocates_too_much_gets_none(box):
  # Untouched memory is no harm where the sandbox does not hold.
  ran = box.python_program('x = bytearray(10 << 30)\nprint("HAS IT")')
  assert 'MemoryError' in ran.output and 'HAS IT' not in ran.output
  assert ran.exit_code == 1


def test_many_processes_that_allocate_together_are_ended(box):
  # 6 x 100 MB at most; 200 are allowed.
  ran = box.python_program("""
import os, signal, time
signal.alarm(20)
for _ in range(6):
  if os.fork() == 0:
    signal.alarm(20)
    x = bytearray(b'x') * (100 << 20)
    time.sleep(15)
    os._exit(0)
time.sleep(15)
print('SURVIVED')
""")
  assert 'SURVIVED' not in ran.output and ran.exit_code is None
  # A look between two allocations may count their kernel memory.
  assert re.search(
    'its processes (together )?used .* MB of memory, .*limit is 200 MB',
    ran.kill_reason,
  )


@pytest.mark.parametrize('path', ['/sandbox/x', '/tmp/x', '/dev/shm/x'])
def test_files_in_memory_are_bounded(box, path):
  ran = box.python_program(f"""
import signal
# A file over its limit is told by an error, not by a signal.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
made = 0
try:
  for i in range(8):
    with open({path!r} + str(i), 'wb') as file:
      file.write(b'x' * (1 << 20))
    made += 1
except OSError as e:
  print(type(e).__name__)
print(made)
""")
  # 4 MB, of which the directory itself may take a page.
  assert ran.output.splitlines()[0] == 'OSError'
  assert 3 <= int(ran.output.split()[-1]) <= 4


def test_memory_that_is_of_no_process_is_refused(box):
  ran = box.python_program("""
import ctypes, os
try:
  os.memfd_create('x')
  print('MADE')
except PermissionError:
  print('refused')
libc = ctypes.CDLL(None, use_errno=True)
print('MADE' if libc.shmget(0, 1 << 20, 0o1600) >= 0 else 'refused')
print('MADE' if libc.unshare(0x10000000) == 0 else 'refused')
# As clone has it: a child with all rights in a namespace of its own, who could
# mount a file system in memory.
clone = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]
child = libc.syscall(clone, 0x10000011, 0, 0, 0, 0)
if child == 0:
  os._exit(0)
print('MADE' if child > 0 else 'refused')
print('MADE' if libc.syscall(430, b'tmpfs', 0) >= 0 else 'refused')
""")
  assert ran.output == 'refused\n' * 5


# Ways to have memory that is no process's; each stops by itself at 700 MB,
# where 200 are allowed, and waits to be ended.
HOLDERS = {
  'buffers of sockets': """
import socket
held = []
while total < LIMIT and len(held) < 110:
  pair = socket.socketpair()
  held.append(pair)
  for end in pair:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    end.setblocking(False)
    try:
      while total < LIMIT:
        total += end.send(bytes(1 << 16))
    except BlockingIOError:
      pass
""",
  'shared pages that nobody maps': """
import mmap
for _ in range(6):
  if os.fork() == 0:
    shared = mmap.mmap(-1, 110 << 20)
    for at in range(0, len(shared), 4096):
      shared[at] = 1
      # Gone from the process, not from the kernel.
      if at % (4 << 20) == 0:
        shared.madvise(mmap.MADV_DONTNEED)
    time.sleep(20)
    os._exit(0)
""",
}


@pytest.mark.parametrize('way', HOLDERS)
def test_memory_that_no_process_holds_counts_and_ends_the_program(box, way):
  ran = box.python_program(f"""
import os, signal, time
signal.alarm(20)
LIMIT, total = 700 << 20, 0
{HOLDERS[way]}
time.sleep(15)
print('SURVIVED')
""")
  assert 'SURVIVED' not in ran.output and ran.exit_code is None
  assert 'of memory' in ran.kill_reason and ran.kill_reason.startswith(
    'killed: '
  )


def test_names_of_files_count_and_end_the_program(box, monkeypatch):
  # The figures of the machine show them as memory that can be had back.
  monkeypatch.setattr(process.cgroup.MachineMemory, 'growth', lambda machine: 0)
  ran = Sandbox(ResourceLimits(seconds=20, memory=60 * MB)).shell_program("""
cd /tmp && echo > f && for i in 1 2 3 4 5 6 7 8; do
  mkdir $i && python3 -c "
import os
for n in range(15000): os.link('f', '$i/' + str(n).rjust(250, 'x'))"
done
echo SURVIVED
""")
  assert 'SURVIVED' not in ran.output and 'of memory' in ran.kill_reason


def test_memory_in_swap_counts(monkeypatch):
  status = 'PPid:\t1\nRssAnon:\t7 kB\nVmSwap:\t11 kB\nThreads:\t2\n'
  monkeypatch.setattr(process.os, 'listdir', lambda path: ['4000000'])
  opened = lambda path: io.StringIO(status)  # noqa: E731
  monkeypatch.setattr(process, 'open', opened, raising=False)
  assert process._memory_and_threads(4000000) == (18 * 1024, 2)


def test_sockets_are_of_one_family_and_pairs_too(box):
  ran = box.python_program("""
import socket
# AF_UNIX; then INET, INET6, NETLINK, PACKET, ALG, VSOCK, BLUETOOTH, XDP and
# numbers whose low half or whose next is AF_UNIX.
made = []
for family in (1, 2, 10, 16, 17, 38, 40, 31, 44, 0, 3, 257, 1 << 16):
  for kind in (1, 2, 3):
    for make in (socket.socket, socket.socketpair):
      try:
        make(family, kind)
        made.append(family)
      except OSError as e:
        if family != 1:
          assert e.errno == 97, (family, e)
print(sorted(set(made)))
import asyncio
print(asyncio.run(asyncio.sleep(0, 'asyncio')))
""")
  assert ran.output == '[1]\nasyncio\n'


@pytest.mark.parametrize('kind', ['STREAM', 'DGRAM', 'SEQPACKET', 'RAW'])
def test_a_socket_in_a_readable_directory_is_not_reached(box, kind):
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    path = f'{folder}/socket'
    command = {'RAW': 'DGRAM'}.get(kind, kind)
    with socket.socket(
      socket.AF_UNIX, getattr(socket, f'SOCK_{command}')
    ) as host:
      host.bind(path)
      os.chmod(path, 0o777)
      host.setblocking(False)
      if command != 'DGRAM':
        host.listen()
      ran = Sandbox(readable=[folder]).python_program(f"""
import os, socket
ends = []
for make in (socket.socket, socket.socketpair):
  try:
    made = make(socket.AF_UNIX, socket.SOCK_{kind})
    ends += [made] if make is socket.socket else made
  except OSError:
    pass
for end in ends:
  for way in (
    lambda: end.sendto(b'x', {path!r}),
    lambda: end.sendmsg([b'x'], [], 0, {path!r}),
    lambda: end.connect({path!r}),
  ):
    try:
      way()
    except OSError:
      pass
print(os.path.exists({path!r}))
import asyncio
print(asyncio.run(asyncio.sleep(0, 'asyncio')))
""")
      assert ran.output == 'True\nasyncio\n'
      with pytest.raises(BlockingIOError):
        host.recv(1) if command == 'DGRAM' else host.accept()


def test_a_control_group_is_entered_bounded_and_removed(tmp_path, monkeypatch):
  # A directory in place of cgroupfs, as no such group may be had here: what is
  # written, in what order and where, not what a kernel does with it.
  (tmp_path / 'self').write_text('1:name=x:/\n0::/user/scope\n')
  (tmp_path / 'user' / 'scope').mkdir(parents=True)
  monkeypatch.setattr(cgroup, '_ROOT', tmp_path)
  monkeypatch.setattr(cgroup, '_SELF', tmp_path / 'self')
  # A group that hands nothing on, and a parent that has not the controllers.
  (tmp_path / 'user' / 'scope' / 'cgroup.subtree_control').write_text('')
  (tmp_path / 'user' / 'cgroup.subtree_control').write_text('cpu memory')
  assert cgroup.create_group(MB, 7) is None
  (tmp_path / 'user' / 'cgroup.subtree_control').write_text('memory pids')
  group = cgroup.create_group(MB, 7)
  assert group.path.parent == tmp_path / 'user'
  written = {path.name: path.read_text() for path in group.path.iterdir()}
  assert written == {
    'memory.max': str(MB),
    # And those of the sandbox itself.
    'pids.max': str(7 + cgroup.HELPER_PROCESSES),
    'memory.swap.max': '0',
    'memory.oom.group': '1',
    'cgroup.procs': '0\n',
  }
  command = group.wrap(['printf', '%s,', 'a b', '$0', '; ls'])
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.stdout == 'a b,$0,; ls,'
  assert not group.was_oom_killed()
  (group.path / 'memory.events').write_text('low 0\noom_kill 2\n')
  assert group.was_oom_killed()
  for path in group.path.iterdir():
    path.unlink()
  # Of cgroupfs the files go with their directory.
  monkeypatch.setattr(pathlib.Path, 'write_text', lambda *_: None)
  group.close()
  assert not group.path.exists()


def as_nobody(command, folder):
  """Runs a command as user 65534, whom no file of the system belongs to."""
  user = '--reuid=65534 --regid=65534 --clear-groups --inh-caps=-all'
  return subprocess.run(
    ['setpriv', *user.split(), *command],
    capture_output=True,
    text=True,
    timeout=280,
    cwd=ROOT,
    env={
      'PATH': os.environ['PATH'],
      'HOME': folder,
      'PYTHONDONTWRITEBYTECODE': '1',
    },
  )


@pytest.mark.slow
def test_all_of_this_holds_for_an_ordinary_user():
  if os.geteuid() != 0:
    pytest.skip('this is an ordinary user already')
  if why := bubblewrap.unavailable_reason():
    pytest.skip(f'no sandbox here: {why}')
  with tempfile.TemporaryDirectory() as folder:
    os.chown(folder, 65534, 65534)
    # root's interpreter may lie in root's home: one of the system's, with the
    # packages of this one.
    command = as_nobody(
      ['/usr/bin/python3', '-m', 'venv', '--without-pip', f'{folder}/venv'],
      folder,
    )
    python = f'{folder}/venv/bin/python'
    for place in pathlib.Path(folder).glob('venv/lib/*/site-packages'):
      packages = [p for p in sys.path if p.endswith('site-packages')]
      (place / 'packages.pth').write_text('\n'.join(packages) + '\n')
    tried = ['-c', 'import moepeft.agent, numpy, pydantic_core, pytest']
    if command.returncode or as_nobody([python, *tried], folder).returncode:
      pytest.skip('another user has no Python here that has the packages')
    options = f'-q -n 0 -p no:cacheprovider --basetemp={folder}/tmp -m'.split()
    done = as_nobody(
      [python, '-m', 'pytest', *options, 'not slow', '-rs', __file__], folder
    )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
  assert 'skipped' not in done.stdout.splitlines()[-1], done.stdout[-3000:]


def test_an_endless_loop_is_ended_and_its_output_so_far_kept(box):
  short = Sandbox(ResourceLimits(seconds=1.5, memory=200 * MB))
  # The sleeping one uses no CPU; both write before.
  for code in ('while True: pass', 'import time\ntime.sleep(60)'):
    begun = time.monotonic()
    ran = short.python_program(f'print("begun", flush=True)\n{code}')
    # Far above 1.5 s, as other programs run too; far below 60.
    assert time.monotonic() - begun < 30
    assert ran.exit_code is None and ran.kill_reason == 'killed after 1.5 s'
    # Under load the interpreter may not have begun.
    assert ran.output in ('begun\n', '')


def test_a_flood_of_output_keeps_its_ends_and_no_more(box):
  ran = box.python_program("""
import sys
print('first')
for _ in range(200):
  sys.stdout.write('x' * 100_000)
print()
print('last')
""")
  assert ran.exit_code == 0
  assert ran.output.startswith('first\nxxx')
  assert ran.output.endswith('xxx\nlast\n')
  assert 'bytes are left out here]' in ran.output
  # 4,000 bytes and the note.
  assert len(ran.output) < 4100


def test_its_user_is_not_root_and_has_no_rights(box):
  ran = box.shell_program(
    'id -u; grep -E "CapEff|NoNew|Seccomp:" /proc/self/status'
  )
  user, *rights = ran.output.splitlines()
  assert int(user) != 0
  assert [line.split()[1] for line in rights] == ['0000000000000000', '1', '2']


def test_the_tools_tell_the_model_what_happened(box):
  replies = [
    wants(('run_python', {'code': 'print(6 * 7)'})),
    wants(('run_shell', {'command': 'cat /etc/shadow'})),
    text_reply('42'),
  ]
  with serving(*replies) as script:
    Agent(script.model(), bubblewrap.code_tools(box)).ask('6 * 7?')
  first, second = (r['messages'][-1]['content'] for r in script.requests[1:])
  assert first == '<tool_output>\n42\n</tool_output>'
  assert 'No such file' in second and '[exit status 1]' in second


def test_without_a_sandbox_the_tools_refuse(monkeypatch):
  monkeypatch.setattr(
    bubblewrap, 'unavailable_reason', lambda: 'bwrap is not installed'
  )
  with pytest.raises(ValueError) as caught:
    Sandbox(BOUNDS)
  output = str(caught.value)
  assert 'bwrap is not installed' in output and '--unsafe_no_sandbox' in output
  assert '\n' not in output


def test_bubblewrap_is_given_the_seccomp_filter_as_a_file(monkeypatch):
  # Where bubblewrap is missing, no other test reaches this code.
  filters = []

  def run_limited(command, limits, environment, pass_fds):
    assert command[command.index('--seccomp') + 1] == str(pass_fds[0])
    filters.append(os.pread(pass_fds[0], 1 << 16, 0))

  monkeypatch.setattr(bubblewrap, 'unavailable_reason', lambda: '')
  monkeypatch.setattr(bubblewrap, 'run_limited', run_limited)
  Sandbox(BOUNDS).run(['true'])
  Sandbox(BOUNDS, readable=['/srv']).run(['true'])
  program = bubblewrap.seccomp.program
  assert filters == [program(connects=True), program(connects=False)]


def test_what_bubblewrap_says_is_why_it_is_not_usable(monkeypatch):
  bubblewrap.unavailable_reason.cache_clear()
  try:
    monkeypatch.setattr(bubblewrap.shutil, 'which', lambda name: None)
    assert bubblewrap.unavailable_reason() == 'bwrap is not installed'
    bubblewrap.unavailable_reason.cache_clear()
    monkeypatch.setattr(bubblewrap.shutil, 'which', lambda name: name)
    failed = subprocess.CompletedProcess(
      [], 1, '', 'bwrap: No permissions to create new namespace\n'
    )
    monkeypatch.setattr(bubblewrap.subprocess, 'run', lambda *a, **k: failed)
    assert (
      'No permissions to create new namespace'
      in bubblewrap.unavailable_reason()
    )
  finally:
    bubblewrap.unavailable_reason.cache_clear()


@pytest.mark.skipif(not shutil.which('prlimit'), reason='there is no prlimit')
def test_told_by_name_programs_run_without_it():
  box = Sandbox(ResourceLimits(seconds=20), unsafe_no_sandbox=True)
  ran = box.python_program('import os\nprint(os.environ.get("PWD"), 2 + 3)')
  assert ran.output == 'None 5\n'
  ended = Sandbox(
    ResourceLimits(seconds=0.5), unsafe_no_sandbox=True
  ).shell_program('sleep 30 & sleep 30')
  assert ended.kill_reason == 'killed after 0.5 s'


def verdict(program, machine, number, flags=0):
  """The filter's answer to a system call with this first argument."""
  lines, at, sockets = list(struct.iter_unpack('<HBBI', program)), 0, None
  output = {0: number, 4: machine, 16: flags}
  while True:
    code, true, false, value = lines[at]
    if code == 0x06:
      return value
    if code == 0x20:
      sockets = output[value]
      at += 1
      continue
    holds = {
      0x15: sockets == value,
      0x35: sockets >= value,
      0x45: sockets & value,
    }[code]
    at += 1 + (true if holds else false)


def test_the_filter_lets_through_what_programs_need_and_no_more(monkeypatch):
  allow, refuse, kill, none = 0x7FFF0000, 0x00050001, 0x80000000, 0x00050026
  for name, machine, clone, refused in (
    ('x86_64', 0xC000003E, 56, (29, 165, 272, 319, 323)),
    ('aarch64', 0xC00000B7, 220, (40, 97, 194, 279, 282)),
  ):
    monkeypatch.setattr(seccomp.platform, 'machine', lambda name=name: name)
    program = seccomp.program()
    assert len(program) % 8 == 0
    # read, exit and the like; io_uring, fsopen and memfd_secret.
    for number in (0, 1, 60, 93, 231, 257):
      assert verdict(program, machine, number) == allow
    for number in (*refused, 425, 430, 447):
      assert verdict(program, machine, number) == refuse
    assert verdict(program, machine, clone, 0x01200011) == allow
    assert verdict(program, machine, clone, 0x10000011) == refuse
    assert verdict(program, machine, 435) == none
    assert verdict(program, machine, 0x40000000) == refuse
    assert verdict(program, 0x40000003, 0) == kill
    # socket and socketpair.
    for number in {'x86_64': (41, 53), 'aarch64': (198, 199)}[name]:
      assert verdict(program, machine, number, 1) == allow
      for family in (0, 2, 10, 16, 17, 38, 40, 257):
        assert verdict(program, machine, number, family) == 0x00050061
