# SPDX-License-Identifier: Apache-2.0
"""Small disks that are really full; skipped where mounting is not allowed."""

import dataclasses
import pathlib
import subprocess

import pytest


@dataclasses.dataclass
class Disk:
  path: pathlib.Path

  def fill(self, leave: int = 0) -> None:
    """Takes all space but so many bytes."""
    with open(self.path / 'filler', 'ab', buffering=0) as f:
      try:
        while True:
          f.write(bytes(4096))
      except OSError:
        pass
      f.truncate(max(f.tell() - leave, 0))

  def free(self) -> None:
    (self.path / 'filler').unlink()


def mount(path: pathlib.Path, options: str) -> None:
  path.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(path)]
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError:
    pytest.skip('there is no mount')
  if done.returncode:
    pytest.skip(f'mounting is not allowed here: {done.stderr.strip()}')


def unmount(path: pathlib.Path) -> None:
  subprocess.run(['umount', '-l', str(path)], check=True)


@pytest.fixture
def full_disk(tmp_path):
  """A disk of 2 MiB."""
  path = tmp_path / 'disk'
  mount(path, 'size=2m')
  yield Disk(path)
  unmount(path)


@pytest.fixture
def locked_disk(tmp_path):
  """A disk that is mounted to be read only, which binds root too."""
  path = tmp_path / 'locked'
  mount(path, 'ro,size=64k')
  yield path
  unmount(path)
