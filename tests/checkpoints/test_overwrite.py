# SPDX-License-Identifier: Apache-2.0
"""A directory that is replaced is the old one or the new one at any moment."""

import dataclasses
import os
import pathlib
import shutil

import numpy as np
import pytest

from moepeft.checkpoints import adapter, directory
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.t5x import model as t5x
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params

from ..contracts import small
from ..disks import full_disk  # noqa: F401


class Killed(BaseException):
  """The process is gone: nothing that it calls afterwards happens."""


# Of the system, as pathlib and shutil call it.
CALLS = ('rename', 'replace', 'rmdir', 'unlink', 'mkdir')


def killing(monkeypatch, at):
  """Lets the call `at` that changes a directory fail, and all later ones."""
  count = 0

  def wrapped(plain):
    def call(*args, **options):
      nonlocal count
      count += 1
      if count > at:
        raise Killed
      return plain(*args, **options)

    return call

  for name in CALLS:
    monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
  monkeypatch.setattr(directory, 'exchange', wrapped(directory.exchange))
  return lambda: count


def write(path, text):
  with directory.atomic_directory(str(path), overwrite=True) as made:
    for name in ('a.json', 'b.txt'):
      (made / name).write_text(text)


def content(path):
  return {f.name: f.read_text() for f in pathlib.Path(path).iterdir()}


def both(text):
  return {'a.json': text, 'b.txt': text}


@pytest.mark.parametrize('exchanges', [True, False])
def test_a_kill_at_any_call_leaves_old_or_new(tmp_path, monkeypatch, exchanges):
  if not exchanges:
    # As on file systems that cannot.
    monkeypatch.setattr(directory, 'exchange', lambda one, other: False)
  at, ended, absent = 0, False, 0
  while not ended:
    folder = tmp_path / f'{exchanges}{at}'
    folder.mkdir()
    target = folder / 'out'
    write(target, 'old')
    with monkeypatch.context() as patch:
      killing(patch, at)
      try:
        write(target, 'new')
        ended = True
      except Killed:
        pass
    if target.exists():
      assert content(target) in (both('old'), both('new')), at
    else:
      absent += 1
      assert not exchanges, 'there was a moment without either'
      # The next call begins by putting the old one back.
      with pytest.raises(directory.CheckpointError, match='already contains'):
        directory.check_output(target, overwrite=False)
      assert content(target) == both('old')
    write(target, 'newest')
    assert content(target) == both('newest')
    at += 1
  assert content(target) == both('newest') and at > 4
  assert absent == (0 if exchanges else 1)


def test_an_error_while_replacing_leaves_the_old_one(tmp_path, monkeypatch):
  target = tmp_path / 'out'
  write(target, 'old')
  monkeypatch.setattr(directory, 'exchange', lambda one, other: False)
  plain = os.rename

  def failing(source, destination):
    if str(destination) == str(target) and '.old' not in str(source):
      raise OSError('input/output error')
    plain(source, destination)

  monkeypatch.setattr(os, 'rename', failing)
  with pytest.raises(OSError, match='input/output'):
    write(target, 'new')
  assert content(target) == both('old')
  assert os.listdir(tmp_path) == ['out']


def test_what_an_interrupted_call_left_is_named(tmp_path, capsys):
  target = tmp_path / 'out'
  write(target, 'old')
  left = tmp_path / '.out.abcdefgh'
  shutil.copytree(target, left)
  write(target, 'new')
  assert f'{left} belongs to' in capsys.readouterr().out
  assert content(left) == both('old')


@pytest.mark.parametrize('kind', ['hf', 't5x', 'moepeft'])
def test_an_export_that_fills_the_disk_is_one_sentence(
  full_disk,  # noqa: F811
  capfd,
  kind,
):
  large = {'a': {'kernel': np.random.default_rng(0).normal(size=700_000)}}
  shape = dataclasses.replace(small.GATED, vocab=20_011)
  target = full_disk.path / 'out'
  full_disk.fill(leave=100_000)
  with pytest.raises(
    directory.CheckpointError, match='disk of .*out is full'
  ) as e:
    if kind == 'moepeft':
      described = adapter.describe(
        'lora(rank=2)', 'official', '', '', 't5', shape
      )
      adapter.save(str(target), large, described)
    else:
      params = init_params(t5.T5(shape), small.batch(), 0)['params']
      {'hf': hf, 't5x': t5x}[kind].save(str(target), shape, params)
  assert len(str(e.value).splitlines()) == 1
  assert capfd.readouterr().err == ''
  assert os.listdir(full_disk.path) == ['filler']
