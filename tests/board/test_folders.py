# SPDX-License-Identifier: Apache-2.0
"""A board reads and writes below its folders, wherever a name or link leads."""

import os

import pytest

from moepeft import config as config_lib
from moepeft.board.folders import Folders


def make_run(path):
  path.mkdir(parents=True)
  (path / 'config.json').write_text('{}')
  (path / 'metrics.jsonl').write_text('')
  return path


@pytest.fixture
def folders(tmp_path):
  make_run(tmp_path / 'runs' / 'a')
  make_run(tmp_path / 'runs' / 'sweep' / 'runs' / 'b')
  make_run(tmp_path / 'outside')
  (tmp_path / 'data').mkdir()
  return Folders(str(tmp_path / 'runs'), [str(tmp_path / 'data')])


def test_runs_are_found_with_those_of_sweeps(folders):
  assert list(folders.names()) == ['a', 'sweep/runs/b']
  assert folders.run('sweep/runs/b').path.endswith('runs/sweep/runs/b')


def test_what_is_in_a_run_or_no_run_is_not_listed(folders, tmp_path):
  make_run(tmp_path / 'runs' / 'a' / 'export')
  make_run(tmp_path / 'runs' / '.board' / 'c')
  (tmp_path / 'runs' / 'empty').mkdir()
  assert list(folders.names()) == ['a', 'sweep/runs/b']


@pytest.mark.parametrize(
  'name',
  [
    *('..', '../outside', 'a/../../outside', '/etc', '', '.', 'a/', '.board'),
    *('a\0', 'a/./.', 'nothing', '.board/c', '~'),
  ],
)
def test_a_name_leads_nowhere_else(folders, name):
  with pytest.raises(ValueError, match='no run'):
    folders.run(name)


def test_a_link_leads_nowhere_else(folders, tmp_path):
  os.symlink(tmp_path / 'outside', tmp_path / 'runs' / 'link')
  with pytest.raises(ValueError, match='no run'):
    folders.run('link')
  with pytest.raises(ValueError, match='no name for a run'):
    folders.new_run('link')


@pytest.mark.parametrize(
  'name', ['', '.x', '../x', 'x/y', '-x', 'x y', 'x\n', 'ä', 'x' * 101, '--x']
)
def test_a_new_run_has_a_plain_name(folders, name):
  with pytest.raises(ValueError, match='is no name for a run'):
    folders.new_run(name)


def test_a_new_run_replaces_no_directory_but_a_failed_start(folders, tmp_path):
  assert folders.new_run('new').path == str(tmp_path / 'runs' / 'new')
  with pytest.raises(ValueError, match='already a directory'):
    folders.new_run('a')
  os.makedirs(os.path.dirname(folders.card('new')))
  with open(folders.card('new'), 'w'):
    (tmp_path / 'runs' / 'new').mkdir()
  assert list(folders.names()) == ['a', 'new', 'sweep/runs/b']
  folders.new_run('new')
  (tmp_path / 'runs' / 'new' / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='already a directory'):
    folders.new_run('new')


def config_with(key, value):
  config = config_lib.default()
  config.update_from_flattened_dict({key: value})
  return config


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('data.path', ''),
    ('data.path', 'package:chats'),
    ('data.path', 'DATA/rows.jsonl'),
    ('data.path', 'glue/mrpc'),
    ('model.path', 'smollm2'),
    ('model.adapter', 'RUNS/a'),
    ('preference.reference', 'base'),
    ('method', "arrow(from_adapters=['RUNS/a', 'DATA/b'])"),
  ],
)
def test_paths_inside_and_names_pass(folders, tmp_path, key, value):
  value = value.replace('DATA', str(tmp_path / 'data'))
  value = value.replace('RUNS', str(tmp_path / 'runs'))
  folders.check_paths(config_with(key, value))


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('data.path', '/etc/passwd'),
    ('data.path', '~/.ssh/id_rsa'),
    ('data.path', 'DATA/../outside'),
    ('data.path', 'DATA/link/config.json'),
    ('data.path', 'DATA/*.jsonl'),
    ('data.path', '../x'),
    ('data.templates', '/etc'),
    ('data.tokenizer', '/etc'),
    ('data.chat_template', '/etc/passwd'),
    ('data.replay', '/etc/passwd'),
    ('evaluation.path', '/etc/passwd'),
    ('model.path', '/etc'),
    ('model.adapter', 'RUNS/.board/x'),
    ('preference.reference', '/etc'),
    ('method', "arrow(from_adapters=['RUNS/a', '/etc'])"),
    ('method', "lora(rank=2) + arrow(from_adapters=['/etc'])"),
  ],
)
def test_a_path_outside_is_refused_with_its_key(folders, tmp_path, key, value):
  os.symlink(tmp_path / 'outside', tmp_path / 'data' / 'link')
  value = value.replace('DATA', str(tmp_path / 'data'))
  value = value.replace('RUNS', str(tmp_path / 'runs'))
  name = 'from_adapters' if key == 'method' else f'config.{key}'
  with pytest.raises(ValueError, match=f'^{name}=.*outside of the folders'):
    folders.check_paths(config_with(key, value))


def test_a_file_here_is_no_name_on_the_hub(folders, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path / 'outside')
  with pytest.raises(ValueError, match='outside of the folders'):
    folders.check_paths(config_with('data.path', 'config.json'))
