# SPDX-License-Identifier: Apache-2.0
"""Only regular files are opened, and nothing waits for a pipe's writer."""

import os
import socket

import pytest

from moepeft.core import files


@pytest.fixture(params=['pipe', 'socket', 'device', 'link to a pipe'])
def odd(request, tmp_path):
  path = tmp_path / 'odd'
  if request.param == 'pipe':
    os.mkfifo(path)
  elif request.param == 'socket':
    # Longer paths than 107 bytes are no address: bind from its folder.
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
      server.bind(f'/proc/self/fd/{descriptor}/odd')
    os.close(descriptor)
  elif request.param == 'device':
    path = '/dev/zero'
  else:
    os.mkfifo(tmp_path / 'pipe')
    path.symlink_to(tmp_path / 'pipe')
  return path


def test_what_is_no_file_is_refused_at_once(odd):
  for read in (files.open_file, files.read_text, files.read_bytes):
    with pytest.raises(files.NotAFile, match='expected a regular file'):
      read(odd)
  with pytest.raises(files.NotAFile):
    files.check_file(odd)


def test_a_pipe_that_takes_the_place_of_a_file_does_not_block(
  tmp_path, monkeypatch
):
  os.mkfifo(tmp_path / 'raced')
  # As if the path had been a file when it was checked.
  monkeypatch.setattr(files, 'check_file', lambda path: None)
  with pytest.raises(files.NotAFile, match='a named pipe'):
    files.open_file(tmp_path / 'raced')


def test_a_folder_with_a_pipe_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  files.check_files(tmp_path)
  os.mkfifo(tmp_path / 'model.safetensors')
  with pytest.raises(files.NotAFile, match='model.safetensors'):
    files.check_files(tmp_path)


def test_files_are_read_without_a_byte_order_mark(tmp_path):
  path = tmp_path / 'text'
  path.write_bytes(b'\xef\xbb\xbfa\n')
  assert files.read_text(path) == 'a\n'
  assert files.read_bytes(path) == b'\xef\xbb\xbfa\n'
  (tmp_path / 'link').symlink_to(path)
  assert files.read_text(tmp_path / 'link') == 'a\n'


def test_absent_files_and_folders_are_told_as_python_does(tmp_path):
  files.check_file(tmp_path / 'absent')
  files.check_file(tmp_path)
  with pytest.raises(FileNotFoundError):
    files.read_text(tmp_path / 'absent')
  with pytest.raises(IsADirectoryError):
    files.read_text(tmp_path)
