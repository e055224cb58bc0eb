# SPDX-License-Identifier: Apache-2.0
"""Data that is edited while a run is under way is noticed when it goes on."""

import json

import pytest

from moepeft import config as config_lib
from moepeft import train
from moepeft.data import fingerprint
from moepeft.runs.resume import check_same_data
from moepeft.runs.run import Run

ROW = {'dataset': 'd', 'template': 't', 'targets': 'out'}


def data_of(path, source='jsonl', **changes):
  data = config_lib.default().data
  data.source, data.path = source, str(path)
  data.update(changes)
  return data


@pytest.fixture
def begun(tmp_path):
  """(folder of data, work directory with a checkpoint of it)."""
  folder, workdir = tmp_path / 'rows', tmp_path / 'w'
  folder.mkdir()
  (folder / 'a.jsonl').write_text('{}')
  (workdir / 'checkpoints' / '4').mkdir(parents=True)
  seen = fingerprint.data_hashes(data_of(folder))
  (workdir / 'data.json').write_text(json.dumps(seen))
  return folder, Run(str(workdir))


@pytest.mark.parametrize('source', ['jsonl', 'chat', 'preference', 'text'])
def test_an_edited_file_is_refused_by_name(begun, source):
  folder, workdir = begun
  check_same_data(workdir, fingerprint.data_hashes(data_of(folder, source)))
  # As many bytes as before.
  (folder / 'a.jsonl').write_text('[]')
  now = fingerprint.data_hashes(data_of(folder, source))
  with pytest.raises(ValueError, match="'a.jsonl' of config.data.path has ch"):
    check_same_data(workdir, now)
  with pytest.raises(ValueError, match='--may_differ=data.path'):
    check_same_data(workdir, now, ['data.paths'])
  for allowed in ('data.path', 'config.data.path', 'data'):
    check_same_data(workdir, now, [allowed])


def test_new_files_and_lost_ones_are_told(begun):
  folder, workdir = begun
  # What no reader reads may come.
  (folder / 'README.md').write_text('of rows')
  check_same_data(workdir, fingerprint.data_hashes(data_of(folder)))
  (folder / 'c.jsonl').write_text('{}')
  with pytest.raises(ValueError, match="'c.jsonl' .* is new since"):
    check_same_data(workdir, fingerprint.data_hashes(data_of(folder)))
  (folder / 'c.jsonl').rename(folder / 'a.jsonl.bak')
  (folder / 'a.jsonl').unlink()
  (folder / 'a.jsonl.bak').unlink()
  with pytest.raises(ValueError, match="'a.jsonl' .* is gone since"):
    check_same_data(workdir, fingerprint.data_hashes(data_of(folder)))


def test_a_run_that_kept_no_hashes_or_has_no_checkpoint_goes_on(begun):
  folder, workdir = begun
  (folder / 'a.jsonl').write_text('[]')
  now = fingerprint.data_hashes(data_of(folder))
  (folder.parent / 'w' / 'data.json').rename(folder.parent / 'data.json')
  check_same_data(workdir, now)
  (folder.parent / 'data.json').rename(folder.parent / 'w' / 'data.json')
  (folder.parent / 'w' / 'checkpoints' / '4').rmdir()
  check_same_data(workdir, now)


def test_replayed_text_and_templates_are_data_too(tmp_path):
  for name in ('rows.jsonl', 'text.txt', 'chat.jinja'):
    (tmp_path / name).write_text(name)
  actual = fingerprint.data_hashes(
    data_of(
      tmp_path / 'rows.jsonl',
      replay=str(tmp_path / 'text.txt'),
      chat_template=str(tmp_path / 'chat.jinja'),
    )
  )
  assert {key: list(names) for key, names in actual.items()} == {
    'path': ['rows.jsonl'],
    'replay': ['text.txt'],
    'chat_template': ['chat.jinja'],
  }
  assert fingerprint.data_hashes(data_of('glue/mrpc', 'datasets')) == {}
  assert fingerprint.data_hashes(data_of(tmp_path, 'seqio')) == {}


def test_large_files_are_known_by_their_size_and_blocks(tmp_path):
  file = tmp_path / 'a.txt'
  file.write_bytes(bytes(3 << 20))
  whole, blocks = (
    fingerprint.sha256(str(file)),
    fingerprint.sha256(str(file), 7),
  )
  assert whole != blocks == fingerprint.sha256(str(file), 7)
  for place in (0, 1 << 20, (3 << 20) - 1):
    edited = bytearray(3 << 20)
    edited[place] = 1
    file.write_bytes(edited)
    assert fingerprint.sha256(str(file), 7) != blocks
    assert fingerprint.sha256(str(file)) != whole
  file.write_bytes(bytes((3 << 20) + 1))
  assert fingerprint.sha256(str(file), 7) != blocks


@pytest.mark.slow
def test_a_run_whose_rows_were_edited_does_not_go_on(tmp_path):
  path = tmp_path / 'rows.jsonl'
  rows = [{**ROW, 'inputs': f'in {i}', 'idx': i} for i in range(40)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  config = config_lib.default()
  config.data = data_of(path, tokenizer='bytes')
  config.model.family, config.model.size = 't5', 'tiny'
  config.model.path, config.method = '', 'full'
  config.steps, config.batch_size = 2, 2
  config.data.inputs_length, config.data.targets_length = 13, 11
  config.evaluation.after = False
  config.log.trackers, config.log.plots = '', False
  workdir = str(tmp_path / 'w')
  train.train(config, workdir)
  config.steps = 3
  train.train(config, workdir)
  path.write_text(path.read_text().replace('in 7', 'in X'))
  config.steps = 4
  with pytest.raises(ValueError, match="'rows.jsonl' .* has changed since"):
    train.train(config, workdir)
  train.train(config, workdir, may_differ=['data.path'])
  train.train(config, workdir)
