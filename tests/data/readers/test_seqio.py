# SPDX-License-Identifier: Apache-2.0
"""SeqIO in and out: our tasks for its users, its tasks and caches for us."""

import collections
import importlib
import importlib.util
import itertools
import subprocess
import sys

import numpy as np
import pytest

from moepeft import tasks, train
from moepeft.data.batching import seq2seq
from moepeft.data.readers import seqio_cache, seqio_stream
from moepeft.data.readers.seqio_stream import SeqioStream, end_with_eos
from moepeft.data.tokenizers.tokenizer import ByteTokenizer

from ...lazy_import import LazyModule
from ...training.test_train import adapter_bytes, base, card  # noqa: F401

# TensorFlow takes five seconds, which every worker would spend.
seqio = LazyModule('seqio')
seqio_tasks = LazyModule('moepeft.tasks.seqio_tasks')
cases = LazyModule('tests.seqio_cases')
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('seqio') is None, reason='needs seqio'
)

LENGTHS = {'inputs': 167, 'targets': 23}


@pytest.fixture(autouse=True, scope='module')
def _our_tasks_are_registered():
  importlib.import_module('moepeft.tasks.seqio_tasks')


@pytest.fixture(scope='module')
def p3(tmp_path_factory):
  """Three tasks in P3's form, of 2 and 3 rows and of 5 in two files.

  The first id says which task a row is of, 3, 4 or 5; the second its number.
  """
  path = tmp_path_factory.mktemp('p3')
  for mark, name, rows, shards in (
    (3, 'glue_mrpc_equivalent', 2, 1),
    (4, 'cnn_dailymail_3.0.0_news', 3, 1),
    (5, 'wiki_qa_exercise', 5, 2),
  ):
    made = [cases.p3_row(mark, i) for i in range(rows)]
    cases.write(path / name, 'train', made, shards)
  stored = [cases.p3_row(5, 50 + i) for i in range(7)]
  cases.write(path / 'wiki_qa_exercise', 'validation', stored)
  ranked = [cases.score_row(i) for i in range(3)]
  cases.write(path / 'wiki_qa_exercise_score_eval', 'train', ranked)
  (path / 'README.md').write_text('not a task')
  return str(path)


def read(stream, count, place=0):
  return list(itertools.islice(stream.examples(place), count))


def listed(elements):
  return [(e['inputs'].tolist(), e['targets'].tolist()) for e in elements]


def keys(elements):
  """(mark, number) of rows of `p3_row`."""
  return [(int(e['inputs'][0]), int(e['inputs'][1]) - 100) for e in elements]


# ------------------------------------------------------- our tasks out ---
def test_the_byte_vocabularies_are_one():
  ours, reference = ByteTokenizer(), seqio.ByteVocabulary()
  text = 'naïve 漢字\x00\x7f?'
  assert ours.encode(text) == list(reference.encode(text))
  assert ours.encode(text) == reference.encode_tf(text).numpy().tolist()
  assert (ours.eos, ours.size) == (reference.eos_id, reference.vocab_size)
  assert (reference.pad_id, seq2seq.PAD) == (0, 0)


def ours(family, split, count):
  """moepeft's encoding of the same examples: (inputs, targets) with EOS."""
  actual = tasks.examples((family,), count, seed=0, split=split)
  return [
    seq2seq.encode_example(ByteTokenizer(), e, *LENGTHS.values())[:2]
    for e in actual
  ]


def converted(pack, split='train', family='storage'):
  dataset = seqio.get_dataset(
    f'moepeft_{family}',
    LENGTHS,
    seqio.EncDecFeatureConverter(pack=pack),
    dataset_split=split,
    shuffle=False,
  )
  return dataset.as_numpy_iterator()


@pytest.mark.parametrize(
  'split, instances', [('train', 'train'), ('validation', 'held_out')]
)
def test_seqio_makes_our_batches_of_our_tasks(split, instances):
  count = 29
  expected = seq2seq.pad_pairs(
    *zip(*ours('storage', instances, count), strict=True), *LENGTHS.values()
  )
  actual = list(itertools.islice(converted(False, split), count))
  for reference, mine in (
    ('encoder_input_tokens', 'inputs'),
    ('decoder_target_tokens', 'targets'),
    ('decoder_input_tokens', 'decoder_inputs'),
    ('decoder_loss_weights', 'targets_mask'),
  ):
    np.testing.assert_array_equal(
      [f[reference] for f in actual], expected[mine]
    )


def test_seqio_packs_the_ids_of_our_tasks():
  expected = ours('storage', 'train', 29)
  actual = []
  for row in converted(True):
    for segment in range(1, row['encoder_segment_ids'].max() + 1):
      x = row['encoder_input_tokens'][row['encoder_segment_ids'] == segment]
      y = row['decoder_target_tokens'][row['decoder_segment_ids'] == segment]
      actual.append((x.tolist(), y.tolist()))
    # More than one in the first row: 167 ids hold two of some 30 to 60.
    assert row['encoder_segment_ids'].max() > 1 or len(actual) > 29
    if len(actual) >= 29:
      break
  assert actual[:29] == expected


def test_every_family_is_a_task_and_every_group_a_mixture():
  names = set(seqio.TaskRegistry.names())
  assert {f'moepeft_{family}' for family in tasks.TASKS} <= names
  for group in tasks.GROUPS:
    mixture = seqio.get_mixture_or_task(f'moepeft_{group.lower()}')
    members = [f'moepeft_{family}' for family in tasks.task_names(group)]
    assert sorted(task.name for task in mixture.tasks) == sorted(members)
    assert {mixture.get_rate(task) for task in mixture.tasks} == {1.0}


def test_a_task_has_as_many_examples_as_it_says(monkeypatch):
  monkeypatch.setitem(seqio_tasks._SPLITS, 'train', ('train', 31))
  rows = list(
    seqio_tasks.dataset('train', False, name='stars').as_numpy_iterator()
  )
  texts = [(row['inputs'].decode(), row['targets'].decode()) for row in rows]
  assert texts == [
    (e.inputs, e.targets) for e in tasks.examples(('stars',), 31, seed=0)
  ]
  task = seqio.get_mixture_or_task('moepeft_stars')
  assert task.num_input_examples('train') == 10_000
  assert task.num_input_examples('validation') == 1_000


def test_accuracy_is_of_whole_answers():
  actual = seqio_tasks.accuracy(['yes', 'no', 'no'], [' yes', 'no.', 'no'])
  # The first and the third of three.
  assert actual == {'accuracy': pytest.approx(200 / 3)}
  (task,) = [seqio.get_mixture_or_task('moepeft_stars')]
  assert task.predict_metric_fns == [seqio_tasks.accuracy]


# ------------------------------------------------- registered tasks in ---
def registered(name='moepeft_b', **changes):
  provider = seqio_stream.find_registered(name)
  return SeqioStream(provider, *LENGTHS.values(), **changes)


@pytest.mark.slow
def test_a_registered_mixture_streams_what_its_tasks_have():
  stream = registered()
  known = {
    (tuple(x), tuple(y))
    for family in tasks.task_names('B')
    for x, y in ours(family, 'train', 1050)
  }
  # Buffers of 1,000 and 50 draws: of a task no row after its 1,050th.
  actual = listed(read(stream, 50))
  assert {(tuple(x), tuple(y)) for x, y in actual} <= known
  assert stream.rates() == {
    f'moepeft_{family}': 0.25 for family in tasks.task_names('B')
  }


def test_a_registered_vocabulary_is_known_and_reads_back():
  stream = registered()
  assert stream.vocabulary_size == 259
  assert stream.decode([*ByteTokenizer().encode('a cap'), 1]) == 'a cap'


def test_validation_is_of_held_out_instances_of_every_task():
  actual = listed(registered().validation(11))
  # 11 over 4 tasks in the order of their names: 2, 3, 3 and 3.
  families = sorted(tasks.task_names('B'))
  expected = [
    pair
    for family, count in zip(families, (2, 3, 3, 3), strict=True)
    for pair in ours(family, 'held_out', count)
  ]
  assert actual == [(list(x), list(y)) for x, y in expected]


def test_validation_of_few_is_of_as_many_tasks():
  actual = listed(registered().validation(2))
  families = sorted(tasks.task_names('B'))
  assert actual == [
    tuple(ours(family, 'held_out', 1)[0]) for family in families[::2]
  ]


def test_unknown_names_are_told_with_their_neighbours():
  with pytest.raises(ValueError, match='registered ones: moepeft_storage'):
    seqio_stream.find_registered('moepeft_storrage')
  with pytest.raises(ValueError, match="no task or mixture 'squad'"):
    seqio_stream.find_registered('squad')


def test_missing_splits_and_features_are_told():
  with pytest.raises(ValueError, match="no split 'test', it has train, val"):
    registered(split='test')
  feature = seqio.Feature(seqio.ByteVocabulary())
  task = seqio.get_mixture_or_task('moepeft_stars')
  lonely = task.replace(name='lm', output_features={'targets': feature})
  with pytest.raises(ValueError, match='lm has no feature inputs, it has tar'):
    SeqioStream(lonely, 5, 5)


def test_a_vocabulary_with_another_end_is_refused():
  other = seqio.Feature(seqio.PassThroughVocabulary(50, eos_id=2))
  task = seqio.get_mixture_or_task('moepeft_stars').replace(
    name='other', output_features=dict.fromkeys(('inputs', 'targets'), other)
  )
  with pytest.raises(ValueError, match='with the id 2, expected 1'):
    SeqioStream(task, 5, 5).examples()


def test_a_task_that_must_be_cached_is_read_from_its_cache(tmp_path):
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  task = seqio.get_mixture_or_task('moepeft_stars').replace(
    name='cached_stars',
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(required=True),
    ],
    output_features={'inputs': feature, 'targets': feature},
  )
  seqio.TaskRegistry.add_provider('cached_stars', task)
  try:
    absent = SeqioStream(seqio_stream.find_registered('cached_stars'), 9, 9)
    with pytest.raises(ValueError, match='seqio_cache_tasks, or name the dir'):
      absent.examples()
    rows = [cases.p3_row(3, i) for i in range(5)]
    cases.write(tmp_path / 'cached_stars', 'train', rows)
    provider = seqio_stream.find_registered('cached_stars', [str(tmp_path)])
    # SeqIO repeats before it shuffles, so a row may come twice before another
    # comes; 5 rows in 200 draws all do.
    actual = read(SeqioStream(provider, 9, 9), 200)
    assert set(keys(actual)) == {(3, i) for i in range(5)}
    assert {tuple(e['targets']) for e in actual} == {(3, 1)}
  finally:
    seqio.TaskRegistry.remove('cached_stars')
    seqio.utils.set_global_cache_dirs([])


# ---------------------------------------------- a directory of caches ---
def test_both_sides_end_with_one_eos_and_are_cut_before_it():
  # Whether the data had one or not; like `batching.cut` of the same ids.
  for given in ([5, 6, 7], [5, 6, 7, 1]):
    assert end_with_eos(given, 9).tolist() == [5, 6, 7, 1]
    assert end_with_eos(given, 4).tolist() == [5, 6, 7, 1]
    assert end_with_eos(given, 3).tolist() == [5, 6, 1]
  assert end_with_eos([], 3).tolist() == end_with_eos([1], 3).tolist() == [1]
  assert end_with_eos([5], 3).dtype == np.int32
  text = 'abcdefg'
  for length in (2, 7, 8, 9):
    cut, _ = seq2seq.encode_truncated(ByteTokenizer(), text, length)
    assert end_with_eos(ByteTokenizer().encode(text), length).tolist() == cut


def directory(path, rates=None, **changes):
  return SeqioStream(seqio_cache.mixture(path, rates), 9, 5, **changes)


def test_p3s_cache_is_read_as_it_lies_on_disk(p3):
  stream = directory(p3)
  # 11 is the mark of the task that ranks: left out.
  assert seqio_cache.sizes(p3) == {
    'glue_mrpc_equivalent': 2,
    'cnn_dailymail_3.0.0_news': 3,
    'wiki_qa_exercise': 5,
  }
  # Proportional: 2, 3 and 5 of 10.
  assert stream.rates() == {
    'glue_mrpc_equivalent': 0.2,
    'cnn_dailymail_3.0.0_news': 0.3,
    'wiki_qa_exercise': 0.5,
  }
  actual = read(stream, 200)
  assert set(keys(actual)) == {
    (mark, i) for mark, rows in ((3, 2), (4, 3), (5, 5)) for i in range(rows)
  }
  for element in actual:
    mark, number = keys([element])[0]
    assert element['inputs'].tolist() == [mark, 100 + number, 7, 1]
    assert element['targets'].tolist() == [mark, 1]
    assert {a.dtype for a in element.values()} == {np.dtype(np.int32)}
    assert set(element) == {'inputs', 'targets'}
  assert stream.vocabulary_size is None and stream.decode is None
  assert keys(stream.validation(5)) == [(5, 50 + i) for i in range(5)]
  assert len(stream.validation(50)) == 7


def test_rates_choose_tasks_and_how_often_they_come(p3):
  stream = directory(p3, {'wiki_qa_exercise': 1, 'glue_mrpc_equivalent': 3.0})
  counts = collections.Counter(mark for mark, _ in keys(read(stream, 800)))
  assert set(counts) == {3, 5}
  # 800 draws with probability 3/4: 600, standard deviation 12.2; five of them.
  assert abs(counts[3] - 600) < 61
  assert set(directory(p3, {'wiki_qa_exercise': 2}).rates()) == {
    'wiki_qa_exercise'
  }
  only = directory(p3, {'wiki_qa_exercise': 1, 'glue_mrpc_equivalent': 0})
  assert {mark for mark, _ in keys(read(only, 50))} == {5}


def test_a_stream_begins_at_any_place(p3):
  stream = directory(p3, seed=3)
  whole = listed(read(stream, 60))
  for place in (1, 43):
    assert listed(read(stream, 60 - place, place)) == whole[place:]
  task = registered('moepeft_stars', seed=3)
  whole = listed(read(task, 50))
  assert listed(read(task, 19, 31)) == whole[31:]


@pytest.mark.slow
def test_seeds_give_other_orders(p3):
  one, two = (keys(read(directory(p3, seed=s), 60)) for s in (0, 1))
  assert one != two


FRESH = """
import hashlib, itertools, sys
from moepeft.data.readers import seqio_cache, seqio_stream
from moepeft.data.readers.seqio_stream import SeqioStream
import moepeft.tasks.seqio_tasks
for provider in (
  seqio_cache.mixture(sys.argv[1]),
  seqio_stream.find_registered('moepeft_stars'),
):
  seen = hashlib.sha256()
  stream = SeqioStream(provider, 99, 9, seed=5)
  for element in itertools.islice(stream.examples(7), 300):
    seen.update(element['inputs'].tobytes() + element['targets'].tobytes())
  print(seen.hexdigest())
"""


@pytest.mark.slow
def test_fresh_processes_agree_on_the_order(p3):
  command = [sys.executable, '-c', FRESH, p3]
  running = [
    subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  one, two = (process.communicate()[0] for process in running)
  assert len(one.split()) == 2 and one == two


def test_hosts_share_the_examples_out(tmp_path):
  # Of the first as many files as hosts, so files are dealt out; of the second
  # fewer, so examples are.
  for name, mark, shards in (('many', 3, 3), ('few', 4, 1)):
    rows = [cases.p3_row(mark, i) for i in range(13)]
    cases.write(tmp_path / name, 'train', rows, shards)
  whole, first, second = (
    # Enough draws that 26 rows which repeat have all come.
    set(keys(read(directory(str(tmp_path), shard=shard), 600)))
    for shard in ((0, 1), (0, 2), (1, 2))
  )
  assert whole == {(mark, i) for mark in (3, 4) for i in range(13)}
  assert first | second == whole
  assert not first & second
  # Examples 0, 2, ... and 1, 3, ... of 13.
  assert sum(mark == 4 for mark, _ in first) == 7
  # Files 0 and 2 of three hold 5 and 4 of 13 rows.
  assert sum(mark == 3 for mark, _ in first) == 9


def test_ids_that_the_model_lacks_are_told(p3):
  assert read(directory(p3, vocab_size=105), 30)
  with pytest.raises(ValueError, match='id 10[1234], but .* has 101 tokens'):
    read(directory(p3, vocab_size=101), 30)


def test_directories_without_tasks_are_told(tmp_path, p3):
  with pytest.raises(ValueError, match='is no directory'):
    seqio_cache.mixture(str(tmp_path / 'absent'))
  with pytest.raises(ValueError, match='holds no cached task'):
    seqio_cache.mixture(str(tmp_path))
  with pytest.raises(ValueError, match="a split 'test', there are train, val"):
    seqio_cache.mixture(p3, split='test')
  with pytest.raises(ValueError, match="1 of 2 tasks .* 'train': squad"):
    seqio_cache.mixture(p3, {'squad': 1, 'wiki_qa_exercise': 1})
  with pytest.raises(
    ValueError, match='has a rate and a number of examples above 0'
  ):
    seqio_cache.mixture(p3, {'wiki_qa_exercise': 0})


def test_tasks_without_ids_are_told(tmp_path):
  row = cases.p3_row(3, 0)
  texts = {'inputs': 'a text', 'targets': row['targets']}
  cases.write(tmp_path / 'texts', 'train', [texts])
  with pytest.raises(ValueError, match="task texts has no token ids 'inputs'"):
    seqio_cache.mixture(str(tmp_path))


def test_copies_cut_short_are_told(tmp_path):
  rows = [cases.p3_row(3, i) for i in range(5)]
  cases.write(tmp_path / 'one', 'train', rows, shards=2)
  file = tmp_path / 'one' / 'train.tfrecord-00001-of-00002'
  whole = file.read_bytes()
  file.write_bytes(whole[:-3])
  with pytest.raises(ValueError, match='cannot be read .DataLossError'):
    read(directory(str(tmp_path)), 20)
  # What git leaves where a large file was not fetched.
  file.write_text('version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(ValueError, match='copy them again'):
    read(directory(str(tmp_path)), 20)
  file.unlink()
  with pytest.raises(ValueError, match='expected 2 files .* got 1'):
    directory(str(tmp_path))
  (tmp_path / 'one' / 'stats.train.json').unlink()
  with pytest.raises(ValueError, match='stats.train.json cannot be read'):
    directory(str(tmp_path))


def test_a_task_without_examples_is_told_and_never_hangs(tmp_path):
  cases.write(tmp_path / 'one', 'train', [cases.p3_row(3, 0)])
  stream = directory(str(tmp_path), shard=(1, 2))
  with pytest.raises(ValueError, match='has no example'):
    read(stream, 3)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['cached', 'registered'])
def test_a_run_on_seqio_cut_in_two_ends_with_the_same_bytes(
  base,  # noqa: F811
  p3,
  tmp_path,
  kind,
):
  changes = {
    'cached': {'data.path': p3},
    'registered': {
      'imports': 'moepeft.tasks.seqio_tasks',
      'data.mixture': 'moepeft_b',
    },
  }[kind] | {'data.source': 'seqio', 'optimizer.schedule': 'constant'}
  train.train(card(base, **changes), str(tmp_path / 'whole'))
  train.train(card(base, **changes, steps=2), str(tmp_path / 'cut'))
  train.train(card(base, **changes), str(tmp_path / 'cut'))
  assert adapter_bytes(tmp_path / 'whole') == adapter_bytes(tmp_path / 'cut')


def test_tensorflow_is_not_imported_and_its_absence_is_one_sentence(tmp_path):
  code = f"""
import sys
import moepeft.train, moepeft.data.readers.seqio_cache
print('tensorflow' in sys.modules, 'seqio' in sys.modules)
sys.modules['seqio'] = None
from moepeft.data.readers import seqio_cache, seqio_stream
for call in (
  lambda: seqio_stream.find_registered('a'),
  lambda: seqio_cache.mixture({str(tmp_path)!r}),
):
  try:
    call()
  except ValueError as e:
    print(e)
try:
  import moepeft.tasks.seqio_tasks
except ImportError as e:
  print(e)
"""
  said = subprocess.check_output([sys.executable, '-c', code], text=True)
  imported, *lines = said.splitlines()
  assert imported == 'False False'
  assert len(lines) == 3
  assert all(line.endswith("pip install 'moepeft[seqio]'") for line in lines)
