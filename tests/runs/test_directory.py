# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a work directory, and sentences where it cannot be."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from moepeft.core.disk import FullDisk, is_full, tell_full_disk
from moepeft.runs.directory import LostWorkdir, open_workdir

from ..disks import full_disk, locked_disk  # noqa: F401

HOLDER = """
import sys, time
from moepeft.runs.directory import open_workdir
with open_workdir(sys.argv[1]):
  print('open', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """A second process that holds tmp_path/w."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path / 'w')],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'open\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_second_run_is_told_who_holds_the_directory(holder, tmp_path):
  with pytest.raises(ValueError, match='another run is in') as refused:
    open_workdir(str(tmp_path / 'w'))
  message = str(refused.value)
  assert f'pid {holder.pid} on {socket.gethostname()}' in message
  assert len(message.splitlines()) == 1
  # A refusal leaves the holder's name for the next one.
  with pytest.raises(ValueError, match=f'pid {holder.pid} '):
    open_workdir(str(tmp_path / 'w'))


def test_the_lock_falls_away_at_kill_9(holder, tmp_path):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with open_workdir(str(tmp_path / 'w')) as workdir:
    assert workdir.path == str(tmp_path / 'w')
    assert (tmp_path / 'w' / 'lock').read_text().split()[1] == str(os.getpid())


def test_the_lock_is_given_back_also_after_an_error(tmp_path):
  with pytest.raises(KeyError):
    with open_workdir(str(tmp_path)):
      raise KeyError
  first = open_workdir(str(tmp_path))
  with pytest.raises(ValueError, match=f'pid {os.getpid()} '):
    open_workdir(str(tmp_path))
  first.close()
  first.close()
  open_workdir(str(tmp_path)).close()


def test_a_program_that_the_run_starts_does_not_keep_the_lock(tmp_path):
  with open_workdir(str(tmp_path)):
    child = subprocess.Popen(['sleep', '60'], close_fds=False)
  try:
    open_workdir(str(tmp_path)).close()
  finally:
    child.kill()
    child.wait()


def test_a_file_in_its_place_is_named(tmp_path):
  (tmp_path / 'file').touch()
  for path in (tmp_path / 'file', tmp_path / 'file' / 'w'):
    with pytest.raises(ValueError, match='cannot write to .*file'):
      open_workdir(str(path))


def test_a_disk_that_is_read_only_is_named(locked_disk):  # noqa: F811
  for path in (locked_disk, locked_disk / 'w'):
    with pytest.raises(ValueError, match='cannot write.*Read-only file system'):
      open_workdir(str(path))


def test_a_directory_without_permission_is_named(tmp_path):
  (tmp_path / 'w').mkdir(mode=0o555)
  if os.geteuid() == 0:
    pytest.skip('permissions do not bind root; see the disk that is read-only')
  with pytest.raises(ValueError, match='cannot write.*Permission denied'):
    open_workdir(str(tmp_path / 'w'))


def test_a_full_disk_is_named_at_the_start(full_disk):  # noqa: F811
  full_disk.fill()
  with pytest.raises(ValueError, match='disk of the work directory .* is full'):
    open_workdir(str(full_disk.path))
  full_disk.free()
  open_workdir(str(full_disk.path)).close()


def test_a_full_disk_says_where_the_command_goes_on():
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with pytest.raises(FullDisk, match='free some space.*of step 3$'):
    with tell_full_disk('/w', lambda: 3):
      raise full
  with pytest.raises(FullDisk, match='begins anew'):
    # As libraries wrap it; and told once only.
    with tell_full_disk('/w', lambda: 5):
      with tell_full_disk('/w', lambda: None):
        raise RuntimeError('failed') from full


def test_other_errors_pass_as_they_are():
  with pytest.raises(OSError, match='denied') as raised:
    with tell_full_disk('/w', lambda: 3):
      raise PermissionError(errno.EACCES, 'denied')
  assert not is_full(raised.value)
  # Memory of a device that is exhausted is no disk.
  assert not is_full(ValueError('RESOURCE_EXHAUSTED: Out of memory'))
  assert is_full(ValueError('RESOURCE_EXHAUSTED: No space left on device'))
  assert is_full(OSError(errno.EDQUOT, 'quota'))


def test_a_directory_that_is_deleted_is_not_written_to_again(tmp_path):
  path = tmp_path / 'w'
  with pytest.raises(LostWorkdir, match='deleted.*no checkpoint is left'):
    with open_workdir(str(path)) as workdir:
      workdir.check()
      shutil.rmtree(path)
      # Another one of its name is another one.
      path.mkdir()
      (path / 'lock').touch()
      workdir.check()


def test_a_directory_that_is_moved_is_named_with_its_checkpoint(tmp_path):
  path = tmp_path / 'w'
  # What fails because of it says so too.
  with pytest.raises(LostWorkdir, match='checkpoint of step 12') as e:
    with open_workdir(str(path)):
      for step in ('2', '12', '13.orbax-checkpoint-tmp'):
        (path / 'checkpoints' / step).mkdir(parents=True)
      path.rename(tmp_path / 'elsewhere')
      (path / 'config.json').write_text('{}')
  assert f"move '{tmp_path}/elsewhere' back" in str(e.value)
  assert isinstance(e.value.__context__, FileNotFoundError)


def test_a_directory_whose_lock_is_gone_may_be_entered_by_others(tmp_path):
  (tmp_path / 'checkpoints' / '4').mkdir(parents=True)
  with pytest.raises(LostWorkdir, match='lock file is gone.*of step 4'):
    with open_workdir(str(tmp_path)) as workdir:
      (tmp_path / 'lock').unlink()
      workdir.check()
