# SPDX-License-Identifier: Apache-2.0
"""No key of the environment reaches a log, an error or a trace."""

import importlib.util
import os
import subprocess
import sys

import pytest

from moepeft.data.readers import seqio_cache
from moepeft.data.readers.seqio_stream import SeqioStream

from ...lazy_import import LazyModule

cases = LazyModule('tests.seqio_cases')
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('seqio') is None, reason='needs seqio'
)

SECRET = 'sk-qqqqqqqqqqqqqqqqqqqqqqqq'
READ = """
import sys
from moepeft.data.readers import seqio_cache
from moepeft.data.readers.seqio_stream import SeqioStream
stream = SeqioStream(seqio_cache.mixture(sys.argv[1]), 8, 4)
print(len([next(stream.examples(0)) for _ in range(3)]))
"""


@pytest.mark.slow
def test_reading_a_cache_prints_nothing_of_the_environment(tmp_path):
  cases.write(
    tmp_path / 'task', 'train', [cases.p3_row(3, i) for i in range(5)]
  )
  actual = subprocess.run(
    [sys.executable, '-c', READ, str(tmp_path)],
    env=os.environ | {'WANDB_API_KEY': SECRET},
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert actual.stdout.strip() == '3'
  assert SECRET not in actual.stdout + actual.stderr
  assert 'AutoGraph' not in actual.stderr


def test_what_tensorflow_traces_calls_nothing_of_ours(tmp_path, monkeypatch):
  # AutoGraph prints what it cannot convert of what is called, whole.
  cases.write(
    tmp_path / 'task', 'train', [cases.p3_row(3, i) for i in range(5)]
  )
  provider = seqio_cache.mixture(str(tmp_path))
  monkeypatch.setattr(seqio_cache, 'import_seqio', None)
  element = next(SeqioStream(provider, 8, 4).examples(0))
  assert element['inputs'].tolist()[0] == 3


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('info', '{"num_shards": "1", "features": {}}'),
    ('info', '{"num_shards": 1}'),
    ('info', '{"num_shards": 1, "features": [1]}'),
    ('info', '[1]'),
    ('info', '[' * 9999),
    ('stats', '{"examples": null}'),
    ('stats', '{"examples": [5]}'),
    ('stats', '{"examples": 1' + '0' * 40 + '}'),
    ('stats', 'null'),
  ],
)
def test_descriptions_of_a_cache_of_odd_types_are_one_sentence(
  tmp_path, name, text
):
  cases.write(
    tmp_path / 'task', 'train', [cases.p3_row(3, i) for i in range(3)]
  )
  (tmp_path / 'task' / f'{name}.train.json').write_text(text)
  with pytest.raises(ValueError, match='copy the task again') as e:
    seqio_cache.mixture(str(tmp_path))
  assert '\n' not in str(e.value)


def test_a_pipe_in_the_place_of_a_cache_is_refused_at_once(tmp_path):
  cases.write(
    tmp_path / 'task', 'train', [cases.p3_row(3, i) for i in range(3)]
  )
  (records,) = (tmp_path / 'task').glob('*.tfrecord-*')
  records.unlink()
  os.mkfifo(records)
  with pytest.raises(OSError, match='it is a named pipe'):
    seqio_cache.mixture(str(tmp_path))
