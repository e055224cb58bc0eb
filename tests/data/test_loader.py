# SPDX-License-Identifier: Apache-2.0
"""Mixing, packing and loading: the same stream whoever reads it and how."""

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data import make_loader, mixing, open_data
from moepeft.data.batching import packing
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.loader import WINDOW_SIZE, Loader, StreamWindows
from moepeft.data.readers import jsonl_rows
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.tasks import Example
from tests import ROOT

P3 = ROOT.parent / 'shared/data/p3/train.jsonl.gz'


def rows(**sizes):
  return {
    name: [Example(name, 't', i, f'{name}{i}', 'y', (), -1) for i in range(n)]
    for name, n in sizes.items()
  }


def names_of(mixed, count, start=0):
  return [mixed[i].task for i in range(start, start + count)]


# ---- mixing ----


def test_an_epoch_is_a_permutation_and_the_next_another():
  mixed = mixing.mix(rows(a=17), {'a': 1.0}, seed=3)
  first, second = ([mixed[i + e].idx for i in range(17)] for e in (0, 17))
  assert sorted(first) == sorted(second) == list(range(17))
  assert first != second
  again = mixing.mix(rows(a=17), {'a': 1.0}, seed=3)
  other = mixing.mix(rows(a=17), {'a': 1.0}, seed=4)
  assert first == [again[i].idx for i in range(17)]
  assert first != [other[i].idx for i in range(17)]


def test_every_round_holds_the_rates():
  weights = {'a': 5.0, 'b': 2.0, 'c': 1.0}
  mixed = mixing.mix(rows(a=7, b=3, c=2), weights, seed=0)
  for start in (0, 1024, 9 * 1024):
    counts = collections.Counter(names_of(mixed, 1024, start))
    # 1024 in eighths: 640, 256, 128.
    assert counts == {'a': 640, 'b': 256, 'c': 128}
  # In no fixed pattern: the second round's order is another one.
  assert names_of(mixed, 1024) != names_of(mixed, 1024, 1024)


def test_rates_too_small_for_a_round_have_their_turns_in_time():
  weights = {'a': 3000.0, 'b': 1.0}
  mixed = mixing.mix(rows(a=7, b=3), weights, seed=0)
  count = collections.Counter(names_of(mixed, 9 * 1024))['b']
  # 9216 / 3001 = 3.07 turns, rounded up or down.
  assert count in (3, 4)


def test_datasets_come_equally_often_whatever_their_size():
  groups = rows(a=100, b=3, c=11)
  sizes = {name: len(group) for name, group in groups.items()}
  weights = mixing.mixing_rates(sizes, temperature=float('inf'))
  seen = [mixing.mix(groups, weights, 0)[i] for i in range(3 * 1024)]
  turns = collections.Counter(e.task for e in seen)
  assert set(turns.values()) == {1024}
  # Within a dataset each row as often: 1024 = 10 x 100 + 24 = 341 x 3 + 1
  # = 93 x 11 + 1.
  for task, least in (('a', 10), ('b', 341), ('c', 93)):
    counts = collections.Counter(e.idx for e in seen if e.task == task)
    assert (min(counts.values()), max(counts.values())) == (least, least + 1)


def test_rates_are_capped_and_tempered():
  sizes = {'a': 900, 'b': 100, 'c': 4}
  assert mixing.mixing_rates(sizes) == sizes
  assert mixing.mixing_rates(sizes, cap=100) == {'a': 100, 'b': 100, 'c': 4}
  # Square roots of 100, 100 and 4.
  assert mixing.mixing_rates(sizes, 100, 2.0) == {'a': 10, 'b': 10, 'c': 2}


def test_a_temperature_too_low_for_a_number_is_refused():
  # 7 ** 1000 is above 1e308.
  with pytest.raises(ValueError, match='config.data.temperature=0.001'):
    mixing.mixing_rates({'a': 7}, temperature=0.001)


def test_a_dataset_gives_its_rows_in_an_order_of_its_own():
  both = mixing.mix(rows(a=13, b=5), {'a': 1.0, 'b': 2.0}, seed=0)
  alone = mixing.mix(rows(a=13), {'a': 1.0}, seed=0)
  seen = [both[i].idx for i in range(200) if both[i].task == 'a']
  assert seen[:39] == [alone[i].idx for i in range(39)]


# ---- packing ----


def pairs_of(seed, count, inputs, targets):
  """Examples of random lengths whose ids are all different from padding."""
  rng = np.random.default_rng(seed)
  return [
    (
      rng.integers(2, 99, rng.integers(1, inputs + 1)),
      rng.integers(2, 99, rng.integers(1, targets + 1)),
    )
    for _ in range(count)
  ]


def test_packed_rows_hold_every_example_once_and_whole():
  pairs = pairs_of(0, 211, 37, 11)
  lengths = np.array([(len(x), len(y)) for x, y in pairs])
  bins = packing.shuffled_bins(lengths, (53, 17), np.random.default_rng(0))
  out = packing.pack_pairs(pairs, 53, 17, bins)
  actual = []
  for row in range(len(out['inputs'])):
    segments = out['inputs_segments'][row]
    for segment in range(1, segments.max() + 1):
      sides = []
      for name in ('inputs', 'targets'):
        own = out[f'{name}_segments'][row] == segment
        positions = out[f'{name}_positions'][row][own]
        # In one piece, counted from 0.
        np.testing.assert_array_equal(positions, np.arange(own.sum()))
        assert np.ptp(np.flatnonzero(own)) == own.sum() - 1
        sides.append(tuple(out[name][row][own]))
      actual.append(tuple(sides))
  expected = [(tuple(x), tuple(y)) for x, y in pairs]
  assert sorted(actual) == sorted(expected)
  for name in ('inputs', 'targets'):
    real = out[f'{name}_segments'] > 0
    np.testing.assert_array_equal(out[f'{name}_mask'], real)
    np.testing.assert_array_equal(out[name] > 0, real)


def test_decoder_inputs_are_shifted_within_each_example():
  pairs = [([5], [7, 8, 1]), ([5], [9, 1])]
  out = packing.pack_pairs(pairs, 3, 7, [[0, 1]])
  (row,) = out['targets']
  np.testing.assert_array_equal(row, [7, 8, 1, 9, 1, 0, 0])
  np.testing.assert_array_equal(out['decoder_inputs'], [[0, 7, 8, 0, 9, 0, 0]])


def test_no_bin_holds_more_than_its_room_and_few_are_made():
  # Sizes 6, 5, 5, 4 of 10 fit two bins only as 6 + 4 and 5 + 5.
  lengths = np.array([[6, 1], [5, 1], [5, 1], [4, 1]])
  made = packing.best_fit_bins(lengths, (10, 9))
  assert sorted(map(sorted, made)) == [[0, 3], [1, 2]]
  # The other side binds as well.
  assert len(packing.best_fit_bins(lengths, (99, 1))) == 4


@pytest.mark.skipif(not P3.exists(), reason='needs ../shared/data/p3')
@pytest.mark.slow
@pytest.mark.parametrize('lengths', [(512, 128), (1024, 256)])
def test_packed_p3_wastes_less_than_a_twentieth_of_the_encoder(lengths):
  data = config_lib.default().data
  data.source, data.path = 'jsonl', str(P3)
  actual = open_data(data, 0)
  data.inputs_length, data.targets_length = lengths
  data.packing = True
  batches = make_loader(actual, ByteTokenizer(), data, 64, 0)
  real = np.mean([next(batches)['inputs_mask'].mean() for _ in range(8)])
  batches.close()
  assert 1 - real < 0.05


# ---- loading ----


def small(packed, workers=0):
  data = config_lib.default().data
  data.tasks = 'storage'
  data.inputs_length, data.targets_length = 96, 13
  data.packing, data.num_workers = packed, workers
  return data


def opened(packed, shard=(0, 1), workers=0, batch_size=31):
  data = small(packed, workers)
  return make_loader(
    open_data(data, 5), ByteTokenizer(), data, batch_size, 5, shard
  )


def equal(one, two):
  assert one.keys() == two.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], two[key])


@pytest.mark.parametrize('packed', [False, True])
def test_a_stream_goes_on_from_any_place(packed):
  whole = opened(packed)
  # 70 batches of 31 rows: over the border of a window, packed or not.
  seen, places = [], []
  for _ in range(70):
    places.append(whole.position())
    seen.append(next(whole))
  assert places[-1][0] >= 1
  for begin in (0, 1, 32, 33, 69):
    again = opened(packed)
    again.seek(places[begin])
    equal(next(again), seen[begin])
    if begin + 1 < len(seen):
      equal(next(again), seen[begin + 1])
    again.close()
  whole.close()


def test_batches_made_ahead_do_not_move_the_place():
  one = opened(False)
  next(one)
  # The thread is batches ahead by now; the place is still the reader's.
  np.testing.assert_array_equal(one.position(), [0, 31])
  one.close()


def test_worker_processes_do_not_change_the_stream():
  plain, working = opened(True), opened(True, workers=2)
  for _ in range(3):
    next(plain)
  # A place belongs to no number of them.
  working.seek(plain.position())
  # Over the border of a window.
  for _ in range(57):
    equal(next(plain), next(working))
  plain.close()
  working.close()


_WORKED = """
import multiprocessing, time
from tests.data.test_loader import opened

if __name__ == '__main__':
  batches = opened(False, workers=1)
  next(batches)
  print(multiprocessing.active_children()[0].pid, flush=True)
  time.sleep(600)
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path):
  (tmp_path / 'run.py').write_text(_WORKED)
  run = subprocess.Popen(
    [sys.executable, str(tmp_path / 'run.py')],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  worker = int(run.stdout.readline())
  run.kill()
  run.wait()
  until = time.monotonic() + 30
  while _alive(worker) and time.monotonic() < until:
    time.sleep(0.1)
  assert not _alive(worker)


def _alive(pid):
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return False
  # Nobody may be there to bury it.
  return stat.rpartition(')')[2].split()[0] != 'Z'


def test_hosts_share_the_windows_among_them():
  both = [opened(False, (host, 2), batch_size=WINDOW_SIZE) for host in (0, 1)]
  whole = opened(False, batch_size=WINDOW_SIZE)
  for host in (0, 1, 0, 1):
    equal(next(both[host]), next(whole))
  for one in (*both, whole):
    one.close()


def test_a_stream_that_cannot_jump_is_read_from_its_place():
  requests = []

  def stream(place):
    requests.append(place)
    for i in itertools.count(place):
      yield {'inputs': [2 + i % 97, 1], 'targets': [3 + i % 89, 1]}

  windows = StreamWindows(stream, Seq2SeqCollator(ByteTokenizer(), 3, 3))
  one = Loader(windows, 300)
  seen = [next(one) for _ in range(9)]
  one.close()
  two = Loader(windows, 300)
  # 7 batches of 300 rows: 2,100 = 2 windows of 1,024 and 52 rows.
  two.seek([2, 52])
  equal(next(two), seen[7])
  two.close()
  # A generator begins when it is first read: the place 0 of `two` never was.
  assert requests == [0, 2 * WINDOW_SIZE]


@pytest.mark.skipif(not P3.exists(), reason='needs ../shared/data/p3')
@pytest.mark.slow
def test_equal_rates_reach_every_dataset_of_p3():
  actual = jsonl_rows.read(str(P3))
  data = config_lib.default().data
  data.source, data.path = 'jsonl', str(P3)
  data.temperature = float('inf')
  shares = open_data(data, 0).shares
  assert len(shares) == len({row.task for row in actual})
  np.testing.assert_allclose(list(shares.values()), 1 / len(shares))


# ---- by config ----


def opened_sources(path, **changes):
  data = config_lib.default().data
  data.source, data.path = 'jsonl', str(path)
  data.update(changes)
  return open_data(data, 0)


def written(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def glue_rows():
  return [
    {'dataset': d, 'template': t, 'idx': i, 'inputs': f'q{i}', 'targets': 'a'}
    for d, t, n in (
      ('glue_mrpc', 'same', 20),
      ('trec', 'what', 40),
      ('trec', 'who', 40),
      ('squad', 'x', 20),
    )
    for i in range(n)
  ]


def test_a_named_mixture_draws_prompts_at_its_own_rates(tmp_path):
  path = written(tmp_path / 'rows.jsonl', glue_rows())
  actual = opened_sources(path, mixture='t0_train')
  # Training examples of T0: 3,668 of mrpc, 5,452 of trec, for each prompt.
  total = 3668 + 2 * 5452
  assert actual.shares == pytest.approx(
    {
      'glue_mrpc/same': 3668 / total,
      'trec/what': 5452 / total,
      'trec/who': 5452 / total,
    }
  )
  seen = collections.Counter(actual.train[i].task for i in range(10 * 1024))
  assert set(seen) == {'glue_mrpc', 'trec'}
  assert seen['trec'] == pytest.approx(10 * 1024 * 2 * 5452 / total, abs=3)
  assert actual.notes[0] == 't0_train does not hold squad: left out'
  # What is left out of training may still be validated on, and is held out.
  assert {e.idx for e in actual.held_out if e.task == 'trec'} == {38, 39}


def test_caps_and_temperatures_go_by_dataset(tmp_path):
  path = written(tmp_path / 'rows.jsonl', glue_rows())
  # 95 % of 20, 40 and 20 different idx, so 19, 76 and 19 rows.
  shares = opened_sources(path).shares
  assert shares == pytest.approx(
    {'glue_mrpc': 19 / 114, 'trec': 76 / 114, 'squad': 19 / 114}
  )
  shares = opened_sources(path, max_examples_per_task=38).shares
  assert shares['trec'] == pytest.approx(38 / 76)
  shares = opened_sources(path, temperature=2.0).shares
  # Square roots: sqrt(76 / 19) = 2 against 1 and 1.
  assert shares['trec'] == pytest.approx(1 / 2)


def test_bad_rows_are_an_error_or_counted(tmp_path):
  path = written(tmp_path / 'rows.jsonl', [*glue_rows(), {'inputs': 'x'}])
  with pytest.raises(ValueError, match="line 121: expected text in 'targets'"):
    opened_sources(path)
  actual = opened_sources(path, on_bad_row='skip')
  assert len(actual.rows) + len(actual.held_out) == 120
  assert actual.notes[0].startswith('skipped 1 bad row of')
  assert 'line 121' in actual.notes[0]


def test_rows_of_a_table_are_trained_from(tmp_path):
  path = tmp_path / 'table.csv'
  lines = ['inputs,targets', *(f'question {i},answer {i}' for i in range(30))]
  path.write_text('\n'.join(lines))
  actual = opened_sources(path, source='datasets')
  assert actual.shares == {'table': 1.0}
  seen = {actual.train[i].inputs for i in range(len(actual.rows))}
  assert seen == {e.inputs for e in actual.rows}
  assert len(seen) + len(actual.held_out) == 30


def test_raw_rows_are_put_into_words_by_templates(tmp_path):
  rows = [{'text': f'text {i}', 'label': i % 2} for i in range(40)]
  path = written(tmp_path / 'raw.jsonl', rows)
  (tmp_path / 'templates.yaml').write_text(
    'dataset: raw\n'
    'templates:\n'
    '  1:\n'
    '    name: is it?\n'
    "    answer_choices: 'no ||| yes'\n"
    "    jinja: '{{text}} Is it? ||| {{answer_choices[label]}}'\n"
  )
  templates = str(tmp_path / 'templates.yaml')
  actual = opened_sources(path, source='datasets', templates=templates)
  example = actual.train[0]
  assert example.inputs == f'text {example.idx} Is it?'
  assert example.targets == ('no', 'yes')[example.idx % 2]
  assert example.choices == ('no', 'yes')


def test_large_and_small_datasets_come_in_whole_epochs(monkeypatch):
  # On either side of where permutations are no longer held.
  monkeypatch.setattr(mixing, '_MAX_STORED_PERMUTATION', 1 << 12)
  for size in ((1 << 12) - 1, 1 << 12):
    epochs = mixing.ShuffledEpochs(range(size), seed=5)
    for epoch in (0, 3):
      begin = epoch * size
      seen = [epochs[begin + i] for i in range(size)]
      assert sorted(seen) == list(range(size))
      assert seen[:9] != list(range(9))
