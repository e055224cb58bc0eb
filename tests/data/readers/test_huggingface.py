# SPDX-License-Identifier: Apache-2.0
"""Hugging Face `datasets`, local files and names on the hub, become rows."""

import gzip
import json

import datasets
import pytest

from moepeft.data.readers import dataset_rows

ROWS = [
  dict(inputs=f'in {i}', targets='yes' if i % 2 else 'no') for i in range(7)
]
RAW = [dict(text=f'word {i}', label=i % 2) for i in range(7)]
TEMPLATES = """
dataset: mine
templates:
  a: {name: shout, jinja: '{{ text | upper }}! ||| {{ answer_choices[label] }}',
      answer_choices: 'no ||| yes'}
  b: {name: ask, jinja: '{% if label %}{{ text }}? ||| yes{% endif %}'}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """Tables are kept with the test, and no line is drawn for each."""
  folder = tmp_path / 'cache'
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', folder)
  datasets.disable_progress_bars()
  yield
  datasets.enable_progress_bars()


def table(rows=ROWS):
  return datasets.Dataset.from_list(rows)


def jsonl(rows):
  return '\n'.join(map(json.dumps, rows))


WRITERS = {
  'r.json': lambda path: path.write_text(jsonl(ROWS)),
  'array.json': lambda path: path.write_text(json.dumps(ROWS, indent=1)),
  'r.json.gz': lambda path: path.write_bytes(
    gzip.compress(json.dumps(ROWS).encode())
  ),
  'r.jsonl': lambda path: path.write_text(jsonl(ROWS)),
  'r.jsonl.gz': lambda path: path.write_bytes(
    gzip.compress(jsonl(ROWS).encode())
  ),
  'r.csv': lambda path: table().to_csv(path),
  'r.parquet': lambda path: table().to_parquet(path),
  'saved': lambda path: table().save_to_disk(path),
  'folder': lambda path: (
    path.mkdir(),
    table(ROWS[:3]).to_parquet(path / 'train-0.parquet'),
    table(ROWS[3:]).to_parquet(path / 'train-1.parquet'),
    table(ROWS[:2]).to_parquet(path / 'validation.parquet'),
  ),
  'lines': lambda path: (
    path.mkdir(),
    (path / 'train.jsonl').write_text(jsonl(ROWS)),
    (path / 'test.jsonl').write_text(jsonl(ROWS[:2])),
  ),
  'splits': lambda path: datasets.DatasetDict(
    train=table(), validation=table(ROWS[:2])
  ).save_to_disk(path),
}


def write_arrow(path):
  saved = path.parent / 'for_arrow'
  table().save_to_disk(saved)
  (file,) = saved.glob('*.arrow')
  file.rename(path)


WRITERS['r.arrow'] = write_arrow


@pytest.mark.parametrize('name', WRITERS)
def test_any_local_form_gives_the_same_rows(tmp_path, name):
  WRITERS[name](tmp_path / name)
  actual = dataset_rows.read(str(tmp_path / name))
  assert [(e.inputs, e.targets) for e in actual] == [
    (row['inputs'], row['targets']) for row in ROWS
  ]
  assert [e.idx for e in actual] == list(range(7))
  assert {e.task for e in actual} == {name.split('.')[0]}
  assert (actual.skipped, actual.inapplicable) == ((), 0)


@pytest.mark.parametrize(
  ('name', 'split'),
  [('folder', 'validation'), ('splits', 'validation'), ('lines', 'test')],
)
def test_other_splits_are_read_by_name(tmp_path, name, split):
  WRITERS[name](tmp_path / name)
  assert len(dataset_rows.read(str(tmp_path / name), split)) == 2


@pytest.mark.parametrize(
  'name', ['folder', 'splits', 'saved', 'r.csv', 'r.jsonl', 'r.parquet']
)
def test_a_split_that_is_not_there_is_an_error(tmp_path, name):
  WRITERS[name](tmp_path / name)
  with pytest.raises(ValueError) as e:
    dataset_rows.read(str(tmp_path / name), 'dev')
  # What was asked for, of what, and what there is; in one line.
  for said in ('dev', name, 'train'):
    assert said in str(e.value)
  assert '\n' not in str(e.value)


def test_rows_keep_what_they_say_of_themselves(tmp_path):
  row = dict(dataset='d', template='t', idx=5, inputs='q', choices=['a', 'b'])
  row = row | dict(label=1, targets='b')
  rows = [row, dict(inputs='x', targets='y')]
  table(rows).to_parquet(tmp_path / 'r.parquet')
  first, second = dataset_rows.read(str(tmp_path / 'r.parquet'))
  assert (first.task, first.template, first.idx) == ('d', 't', 5)
  assert (first.choices, first.label) == (('a', 'b'), 1)
  # What a row lacks is None in a table.
  assert tuple(vars(second).values()) == ('r', '', 1, 'x', 'y', (), -1, None)


def bad_files(folder):
  """One bad row in each: {name: (file, where)}."""
  rows = [ROWS[0], dict(inputs='q', targets=' '), ROWS[1]]
  table(rows).to_parquet(folder / 'b.parquet')
  (folder / 'b.jsonl').write_text(
    jsonl(rows[:1]) + '\n{"in\n' + jsonl(rows[2:])
  )
  (folder / 'b.json').write_text(json.dumps([ROWS[0], 3, ROWS[1]]))
  return {
    'b.parquet': "b.parquet, train, row 1: expected text in 'targets'",
    'b.jsonl': 'b.jsonl, line 2: not JSON',
    'b.json': 'b.json, row 1: expected an object',
  }


def test_bad_rows_are_named_or_left_out(tmp_path):
  for name, error in bad_files(tmp_path).items():
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match=error):
      dataset_rows.read(path)
    actual = dataset_rows.read(path, on_bad_row='skip')
    assert [e.inputs for e in actual] == ['in 0', 'in 1']
    (reason,) = actual.skipped
    assert error in reason


@pytest.mark.parametrize('name', ['raw.jsonl', 'raw.parquet'])
def test_raw_columns_are_put_into_words(tmp_path, name):
  path, words = tmp_path / name, tmp_path / 'templates.yaml'
  words.write_text(TEMPLATES)
  if name.endswith('l'):
    path.write_text(jsonl(RAW))
  else:
    table(RAW).to_parquet(path)
  actual = dataset_rows.read(str(path), templates=str(words))
  # Seven rows shouted, three of which have label 1 and are asked too.
  assert len(actual) == 10 and actual.inapplicable == 4
  assert [vars(e) for e in actual[1:3]] == [
    dict(task='mine', template='ask', idx=1, inputs='word 1?', targets='yes')
    | dict(choices=(), label=-1, embedding=None),
    dict(task='mine', template='shout', idx=1, inputs='WORD 1!', targets='yes')
    | dict(choices=('no', 'yes'), label=1, embedding=None),
  ]


def test_a_row_that_no_template_can_word_is_bad(tmp_path):
  (tmp_path / 't.yaml').write_text(TEMPLATES)
  rows = [*RAW[:2], dict(text='x'), RAW[2]]
  (tmp_path / 'r.jsonl').write_text(jsonl(rows))
  args = str(tmp_path / 'r.jsonl'), 'train', str(tmp_path / 't.yaml')
  said = r"r.jsonl, line 3: template 'ask' of mine .*'label' is undefined"
  with pytest.raises(ValueError, match=said):
    dataset_rows.read(*args)
  assert len(dataset_rows.read(*args, 'skip').skipped) == 2


def test_raw_columns_without_templates_are_an_error(tmp_path):
  table(RAW).to_parquet(tmp_path / 'raw.parquet')
  (tmp_path / 'raw.jsonl').write_text(jsonl(RAW))
  for name in ('raw.parquet', 'raw.jsonl'):
    with pytest.raises(ValueError, match='columns .*text.* config.data.templ'):
      dataset_rows.read(str(tmp_path / name), on_bad_row='skip')


def test_broken_files_are_one_sentence(tmp_path):
  table().to_parquet(tmp_path / 'cut.parquet')
  data = (tmp_path / 'cut.parquet').read_bytes()
  (tmp_path / 'cut.parquet').write_bytes(data[: len(data) // 2])
  (tmp_path / 'cut.json').write_text('[{"inputs": ')
  (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{}' * 999)[:20])
  (tmp_path / 'odd.txt').write_text('x')
  (tmp_path / 'none').mkdir()
  (tmp_path / 'empty.jsonl').touch()
  for name, error in {
    'cut.parquet': 'cannot be read .*(P|p)arquet',
    'cut.json': 'cannot be read as one array',
    'cut.jsonl.gz': 'cannot be read to its end',
    'odd.txt': 'expected one of .json, .jsonl, .csv',
    'none': 'cannot be read',
    'empty.jsonl': 'holds no rows',
    'absent.csv': 'cannot be read .no such file',
    'absent': 'cannot be read .no such path',
  }.items():
    with pytest.raises(ValueError, match=error) as e:
      dataset_rows.read(str(tmp_path / name), on_bad_row='skip')
    assert name in str(e.value) and '\n' not in str(e.value)


def stand_in(monkeypatch, known):
  """A hub that holds {(name, config): rows}; returns the calls."""
  calls = []

  def load_dataset(name, config=None, *, split):
    calls.append((name, config, split))
    if (name, config) not in known:
      raise datasets.exceptions.DatasetNotFoundError(f"no '{name}' there")
    return table(known[name, config])

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  return calls


@pytest.mark.parametrize(
  ('path', 'calls'),
  [
    ('imdb', [('imdb', None)]),
    ('org/set', [('org/set', None)]),
    ('glue/mrpc', [('glue/mrpc', None), ('glue', 'mrpc')]),
    ('org/glue/mrpc', [('org/glue', 'mrpc')]),
  ],
)
def test_a_hub_name_may_end_with_a_configuration(monkeypatch, path, calls):
  seen = stand_in(monkeypatch, {calls[-1]: ROWS})
  actual = dataset_rows.read(path, 'test[:7]')
  assert seen == [(*call, 'test[:7]') for call in calls]
  assert actual[0].task == path.replace('/', '_')


def test_a_hub_name_finds_its_templates(monkeypatch, tmp_path):
  stand_in(monkeypatch, {('glue', 'mrpc'): RAW})
  for name in ('mrpc', 'qqp'):
    (tmp_path / 'glue' / name).mkdir(parents=True)
    text = TEMPLATES.replace('mine', f'glue\nsubset: {name}')
    (tmp_path / 'glue' / name / 'templates.yaml').write_text(text)
  actual = dataset_rows.read('glue/mrpc', templates=str(tmp_path))
  assert {e.task for e in actual} == {'glue_mrpc'}


@pytest.mark.parametrize('path', ['none', 'a/b', 'a/b/c', 'a/b/c/d', './x'])
def test_a_name_that_is_nowhere_is_one_sentence(monkeypatch, path):
  stand_in(monkeypatch, {})
  with pytest.raises(ValueError, match=f"split 'train' of '{path}' cannot be"):
    dataset_rows.read(path)


def test_no_network_is_one_sentence(monkeypatch):
  calls = []

  def load_dataset(*args, **kwargs):
    calls.append(args)
    raise ConnectionError("Couldn't reach 'glue/mrpc'\non the Hub")

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  with pytest.raises(ValueError, match='hub cannot be reached') as e:
    dataset_rows.read('glue/mrpc')
  assert '\n' not in str(e.value) and 'local files' in str(e.value)
  # It waits for the network once, not for each reading of the name.
  assert calls == [('glue/mrpc',)]
