# SPDX-License-Identifier: Apache-2.0
"""Tables keep the text as it is written; what is no data file is left out."""

import ast
import gzip
import json
import os
import pathlib
import socket

import pytest

from moepeft import config as config_lib
from moepeft.core.files import NotAFile
from moepeft.data import fingerprint
from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat import template as chat_template
from moepeft.data.example import BadRows
from moepeft.data.readers import READERS, dataset_rows, jsonl_rows, promptsource
from moepeft.data.readers.promptsource import PromptTemplate
from moepeft.data.text import documents

from ... import chat_cases

TEMPLATES = """
dataset: d
templates:
  a: {name: say, jinja: '{{ a }} and {{ b }}? ||| {{ c }}'}
"""
# What readers of tables take for nulls, numbers, truths and dates.
CELLS = [
  ('NA', '01234', 'null'),
  ('None', '5', 'True'),
  ('nan', '1e5', '2024-07-26'),
  ('', '-0', 'N/A'),
  ('a,b', 'two\nlines', 'a "quote"'),
  ('5.0', '', '2024-07-26 10:00:00'),
]


def quoted(cell):
  return (
    '"' + cell.replace('"', '""') + '"' if set(cell) & set(',\n"') else cell
  )


def csv(cells, header='a,b,c'):
  return '\n'.join([header, *(','.join(map(quoted, row)) for row in cells), ''])


def rows_of(path, text, name='r.csv', **options):
  (path / 't.yaml').write_text(TEMPLATES)
  (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  return dataset_rows.read(
    str(path / name), templates=str(path / 't.yaml'), **options
  ).examples


@pytest.mark.parametrize('name', ['r.csv', 'R.CSV', 'r.csv.gz'])
def test_cells_are_the_texts_as_written(tmp_path, name):
  text = csv(CELLS).encode()
  text = gzip.compress(text) if name.endswith('gz') else text
  actual = rows_of(tmp_path, text, name)
  assert [(e.inputs, e.targets) for e in actual] == [
    (f'{a} and {b}?'.strip(), c) for a, b, c in CELLS
  ]


def test_texts_of_json_are_read_as_such_from_directories_too(tmp_path):
  rows = [dict(zip('abc', cells, strict=True)) for cells in CELLS]
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'r.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 't.yaml').write_text(TEMPLATES)
  actual = dataset_rows.read(
    str(tmp_path / 'd'), templates=str(tmp_path / 't.yaml')
  )
  assert [e.targets for e in actual] == [c for _, _, c in CELLS]


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('a,b,c\n1,2\n', 'line 2: 2 cells, and the header has 3'),
    ('a,b,c\n1,2,3,4\n', 'line 2: 4 cells, and the header has 3'),
    ('a,b,c\n1,"2\n3",x\n1,2\n', 'line 4: 2 cells'),
    ('a,b,a\n1,2,3\n', "two columns 'a'"),
    ('a,b,c\n1,"2,3\n', 'line 2: not CSV in UTF-8 .unexpected end'),
    (b'a,b,c\n1,2,\xff\n', 'not CSV in UTF-8'),
    ('a,b,c\n1,2,3\n'.encode('utf-16'), 'is not UTF-8 .it begins as UTF-16'),
    ('a,b,c\n1,2,3\n'.encode('utf-16-le'), 'is not UTF-8 .it begins as'),
    (gzip.compress(b'a,b,c\n1,2,3\n'), 'compressed with gzip; give it a name'),
    ('', 'holds no rows'),
  ],
  ids=range(10),
)
def test_a_table_that_is_none_is_one_sentence(tmp_path, text, said):
  with pytest.raises(ValueError, match=f'(t.yaml|r.csv).*{said}') as e:
    rows_of(tmp_path, text)
  assert '\n' not in str(e.value)


def test_a_bad_row_of_a_table_is_left_out(tmp_path):
  actual = rows_of(tmp_path, 'a,b,c\n1,2\n3,4,5\n', on_bad_row='skip')
  assert [e.targets for e in actual] == ['5']


def test_a_null_is_not_printed_as_a_word():
  row = {'a': None, 'b': 'x'}
  say = PromptTemplate('t', '{{ a }} ||| y')
  with pytest.raises(ValueError, match='a null has no text to print'):
    promptsource.apply_template(say, 'd', 0, row, 0)
  # What a template asks of it, it may.
  asked = PromptTemplate('t', '{{ b if a is none else a }} ||| y')
  assert promptsource.apply_template(asked, 'd', 0, row, 0).inputs == 'x'


def test_what_a_template_draws_is_of_the_seed():
  drawn = PromptTemplate('t', '{{ x | random }}{{ x | random }} ||| y')
  row = {'x': list('abcdefghijklmnop')}

  def said(seed):
    return [
      promptsource.apply_template(drawn, 'd', seed, row, i).inputs
      for i in range(20)
    ]

  # Two runs alike by chance: 16^-40.
  assert said(0) == said(0) != said(1)
  with pytest.raises(ValueError, match="'lipsum' is undefined"):
    promptsource.apply_template(
      PromptTemplate('t', '{{ lipsum() }} ||| y'), 'd', 0, row, 0
    )


# ------------------------------------------------------ which files are data
STRAYS = [
  *('train.jsonl.bak', '._train.jsonl', '.train.jsonl.swp', 'train.jsonl~'),
  *('.DS_Store', '.hidden.jsonl', 'train.jsonl.part', 'train.jsonl.crswap'),
  *('#train.jsonl#', '~$train.jsonl', 'train.jsonl.crdownload', 'README.md'),
  *('train.jsonl.tmp', 'train.jsonl.orig', 'train.jsonl.zst', 'Thumbs.db'),
]
ROW = {
  jsonl_rows.read: {'inputs': 'a', 'targets': 'b'},
  documents.read_documents: {'text': 'a'},
  chat_cases.read_conversations: {'instruction': 'a', 'output': 'b'},
}


@pytest.mark.parametrize('stray', STRAYS)
def test_what_is_no_data_file_is_left_out_and_named(tmp_path, stray):
  for number, (read, row) in enumerate(ROW.items()):
    folder = tmp_path / str(number)
    folder.mkdir()
    (folder / 'train.jsonl').write_text(json.dumps(row))
    (folder / stray).write_bytes(json.dumps(row).encode() + b'\nold \xff')
    bad = BadRows()
    source = ('jsonl', 'text', 'chat')[number]
    data = config_lib.default().data
    data.source, data.path = source, str(folder)
    assert list(fingerprint.data_hashes(data)['path']) == ['train.jsonl']
    fingerprint.data_files(str(folder), READERS[source].files, bad)
    assert bad.notes('p') == [f'p: left out, as no data files: {stray}']
    actual = read(str(folder))
    assert len(actual[0] if isinstance(actual, tuple) else actual) == 1


def test_what_is_left_out_reaches_the_user(tmp_path):
  (tmp_path / 'train.jsonl').write_text(json.dumps(ROW[jsonl_rows.read]))
  (tmp_path / 'train.jsonl.bak').write_text('x')
  (tmp_path / 'old').mkdir()
  line = 'p: left out, as no data files: old/, train.jsonl.bak'
  assert jsonl_rows.read(str(tmp_path)).notes('p') == [
    line.replace('p:', f'{tmp_path}:')
  ]
  (tmp_path / 'dev.jsonl').write_text(json.dumps(ROW[jsonl_rows.read]))
  (tmp_path / 'old' / 'more.jsonl').write_text(json.dumps(ROW[jsonl_rows.read]))
  assert dataset_rows.read(str(tmp_path)).notes('p') == [
    f'{tmp_path}: left out, as no data files: train.jsonl.bak, '
    'old/more.jsonl (no split)'
  ]


@pytest.mark.parametrize(
  ('name', 'data'),
  [
    ('train.jsonl', True),
    ('TRAIN.JSONL.GZ', True),
    ('train.jsonl-00000-of-00008', True),
    ('train.jsonl-00000-of-00008.gz', True),
    ('train.jsonl.1', False),
    ('jsonl', False),
    ('.jsonl', False),
  ],
)
def test_endings_tell_what_is_data(name, data):
  assert fingerprint.is_data_file(name, fingerprint.ROW_FILES.endings) == data
  assert not fingerprint.is_data_file(
    'dataset_info.json', fingerprint.CHAT_FILES.endings
  )


def test_parts_of_a_table_are_read(tmp_path):
  rows = [{'inputs': f'q{i}', 'targets': 'a'} for i in range(11)]
  text = '\n'.join(map(json.dumps, rows))
  (tmp_path / 'r.csv').write_text(
    'inputs,targets\n' + ''.join(f'q{i},a\n' for i in range(11))
  )
  (tmp_path / 'd').mkdir()
  # Of one part, as T5X writes it.
  (tmp_path / 'd' / 'r.jsonl-00000-of-00001').write_text(text)
  for path in (tmp_path / 'r.csv', tmp_path / 'd'):
    # A fifth of eleven rows is 2.2.
    for split, expected in (
      *(('train[:20%]', [0, 1]), ('train[9:]', [9, 10])),
      *(('train[-1:]', [10]), ('train[3:5]', [3, 4])),
    ):
      actual = dataset_rows.read(str(path), split)
      assert [row.inputs for row in actual] == [f'q{i}' for i in expected]
    with pytest.raises(
      ValueError, match="'train.:x.' of .*expected a name, or"
    ):
      dataset_rows.read(str(path), 'train[:x]')


def test_files_beside_those_of_a_training_split_are_of_it(tmp_path):
  for name in ('train.jsonl', 'more.jsonl'):
    (tmp_path / name).write_text(json.dumps(ROW[jsonl_rows.read]))
  assert len(dataset_rows.read(str(tmp_path))) == 2


def test_descriptions_of_saved_tables_are_watched(tmp_path):
  for name in ('state.json', 'data.arrow', 'README.md', '.hidden.arrow'):
    (tmp_path / name).write_text('{}')
  (tmp_path / 'train').mkdir()
  (tmp_path / 'train' / 'dataset_info.json').write_text('{}')
  data = config_lib.default().data
  data.source, data.path = 'datasets', str(tmp_path)
  assert sorted(fingerprint.data_hashes(data)['path']) == [
    *('data.arrow', 'state.json', 'train/dataset_info.json')
  ]


def test_pipes_and_sockets_are_refused_at_once(tmp_path):
  pipe = tmp_path / 'train.jsonl'
  os.mkfifo(pipe)
  (tmp_path / 'd').mkdir()
  os.mkfifo(tmp_path / 'd' / 'a.jsonl')
  data = config_lib.default().data
  for read in (*ROW, dataset_rows.read):
    for path in (pipe, tmp_path / 'd'):
      with pytest.raises(NotAFile, match='it is a named pipe, expected a reg'):
        read(str(path))
  data.source, data.path = 'jsonl', str(pipe)
  with pytest.raises(NotAFile):
    fingerprint.data_hashes(data)
  with pytest.raises(ValueError, match='a named pipe'):
    chat_template.read(str(pipe))
  with pytest.raises(ValueError, match='templates.yaml: .*a named pipe'):
    promptsource.read_templates(str(pipe))


def test_a_socket_named_as_a_table_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with socket.socket(socket.AF_UNIX) as opened:
    opened.bind('r.csv')
    with pytest.raises(NotAFile, match='it is a socket'):
      dataset_rows.read('r.csv')


# ---------------------------------------------------------- byte order marks
def test_a_byte_order_mark_is_never_text(tmp_path):
  mark = '\ufeff'
  parts = ['One.', 'Two.\n']
  (tmp_path / 't.txt').write_text(f'{mark}{parts[0]}{mark}{parts[1]}')
  (document,), _ = documents.read_documents(str(tmp_path / 't.txt'))
  assert document.passages == ('One.Two.',)
  line = json.dumps({'inputs': 'a', 'targets': f'{mark}b'})
  (tmp_path / 'r.jsonl').write_text(f'{mark}{line}\n{mark}{line}\n')
  assert [e.targets for e in jsonl_rows.read(str(tmp_path / 'r.jsonl'))] == [
    'b',
    'b',
  ]
  (tmp_path / 'c.jinja').write_text(f'{mark}{{{{ messages }}}}{mark}')
  assert chat_template.read(str(tmp_path / 'c.jinja')) == '{{ messages }}'
  row = {'instruction': f'{mark}a', 'output': 'b'}
  assert chat_formats.parse_conversation(row).turns[0].content == 'a'
  actual = rows_of(tmp_path, f'{mark}a,b,c\n{mark}1,2,3\n')
  assert actual[0].inputs == '1 and 2?'
  (tmp_path / 't.yaml').write_text(mark + TEMPLATES)
  assert promptsource.read_templates(str(tmp_path / 't.yaml')).task == 'd'


@pytest.mark.parametrize('coding', ['utf-16', 'utf-16-be', 'utf-32'])
def test_files_of_another_encoding_are_refused(tmp_path, coding):
  text = json.dumps(ROW[jsonl_rows.read]).encode(coding)
  for name in ('r.jsonl', 'r.json', 'r.txt'):
    (tmp_path / name).write_bytes(text)
  for read, name in (
    (jsonl_rows.read, 'r.jsonl'),
    (chat_cases.read_conversations, 'r.json'),
    (documents.read_documents, 'r.txt'),
  ):
    with pytest.raises(ValueError, match=f'{name} is not UTF-8 .it begins as'):
      read(str(tmp_path / name))


def test_readers_open_files_and_parse_json_in_one_place():
  direct = [
    f'{path.name}:{node.lineno}'
    for path in pathlib.Path(fingerprint.__file__).parent.glob('*.py')
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
    and ast.unparse(node.func) in ('open', 'json.load', 'json.loads')
  ]
  assert direct == []
