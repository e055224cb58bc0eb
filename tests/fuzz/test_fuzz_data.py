# SPDX-License-Identifier: Apache-2.0
"""Mutated rows and files: each is read, or refused in one line.

Seeded. Every reader and row form gets well-formed rows whose types are
swapped, whose fields are removed, renamed and doubled, that are nested deeply
or hold huge numbers, halves of surrogate pairs and control characters; and
files that are cut, are of another encoding or are wrongly packed. A refusal is
a ValueError or an OSError of one line; anything else fails.
"""

import collections
import copy
import gzip
import json
import random
import time

import pytest
import yaml

from moepeft import config as config_lib
from moepeft.data import example as example_lib
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import formats as chat_formats
from moepeft.data.example import BadRows
from moepeft.data.preference import formats as preference_formats
from moepeft.data.preference import tokenize as preference_tokenize
from moepeft.data.readers import (
  csv_table,
  dataset_rows,
  jsonl_rows,
  promptsource,
)
from moepeft.data.text import documents
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)

from .. import chat_cases

# Has words for all that a turn may have.
TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{{ m['name'] }}{{ m['tool_call_id'] }}{{ m['reasoning_content'] }}"
  "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
  "{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
pytestmark = pytest.mark.slow
ROWS, FILES = 3000, 500
# Of a row; none takes a second where nothing hangs.
SECONDS = 20.0

CALL = {'id': 'c1', 'function': {'name': 'f', 'arguments': '{"x": 1}'}}
TOOL = {'name': 'f', 'parameters': {'type': 'object', 'properties': {}}}
TURNS = [
  {'role': 'system', 'content': 'Be kind.'},
  {'role': 'user', 'content': [{'type': 'text', 'text': 'Why?'}], 'name': 'A'},
  {'role': 'assistant', 'content': 'Hm.', 'tool_calls': [CALL], 'loss': True},
  {'role': 'tool', 'tool_call_id': 'c1', 'name': 'f', 'content': '2'},
  {'role': 'assistant', 'content': 'So.', 'weight': 1, 'thinking': 'since'},
]
SHAREGPT = [
  {'from': 'human', 'value': 'Why?'},
  {'from': 'function_call', 'value': '{"name": "f", "arguments": {"x": 1}}'},
  {'from': 'observation', 'value': '2'},
  {'from': 'gpt', 'value': 'So.', 'train': True},
]
USER, SO, NO = TURNS[1], TURNS[4], {'role': 'assistant', 'content': 'No.'}
FORMS = {
  'chat': [
    {'messages': TURNS, 'tools': [TOOL], 'id': 1},
    {'messages': TURNS[1:2] + TURNS[4:], 'functions': json.dumps([TOOL])},
    {'conversations': SHAREGPT, 'system': 'Be kind.', 'tools': '[]'},
    {
      'instruction': 'Why?',
      'input': 'a',
      'output': 'b',
      'history': [['c', 'd']],
    },
    {'prompt': [USER], 'completion': [SO]},
    {'prompt': 'Why?', 'completion': 'So.', 'source': 'x'},
  ],
  'preference': [
    {'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.'},
    {'prompt': 'Why?', 'chosen': [USER, SO], 'rejected': [USER, NO]}
    | {'messages': [USER, SO], 'score': 2.5},
    {'conversations': SHAREGPT[:1], 'chosen': SHAREGPT[3], 'rejected': 'No.'},
    {'messages': TURNS, 'label': True},
    {'prompt': [USER], 'completion': [SO], 'label': False},
    {'instruction': 'Why?', 'input': '', 'output': 'b', 'kto_tag': True},
  ],
  'rows': [
    {'inputs': 'a', 'targets': 'b', 'dataset': 'd', 'template': 't', 'idx': 3},
    {'inputs': 'a', 'choices': ['b', 'c'], 'label': 1, 'task': 'd'},
  ],
  'text': [{'text': 'Once upon a time.', 'url': 'u'}],
}
ODD = [
  *(None, True, False, 0, -1, 1, 0.5, 2**63, -(2**70), 1e308, float('nan')),
  *(float('inf'), '', ' ', '\x00', '\ud800', 'a\udfffb', '\ufeff', '\x1b[2J'),
  *('null', '[]', '{}', '[' * 5000, '{"a":' * 300 + '1' + '}' * 300),
  *('{"name": "\\ud800"}', '{"name": "f", "arguments": "{"}', '9' * 5000),
  *([], {}, [None], [[]], {'a': None}, ['\ud800'], {'\ud800': 1}),
  *([1] * 50, {'role': 3}, {'role': 'user'}, {'type': 'image_url'}),
  *(
    'user',
    'assistant',
    'system',
    'tool',
    'function_call',
    '<image>',
    'é' * 50,
  ),
]
NAMES = [
  *('images', 'loss', 'weight', 'mask', 'tools', 'functions', 'tool_calls'),
  *('function_call', 'system', 'history', 'label', 'text', 'x', '', '\ud800'),
  *('role', 'from', 'value', 'content', 'name', 'Messages', 'reasoning', 'idx'),
]


def deep(levels):
  value = 'a'
  for _ in range(levels):
    value = [value] if levels % 2 else {'a': value}
  return value


def places(value, found=None):
  """(container, key) of everything in a value."""
  found = [] if found is None else found
  keys = value if isinstance(value, dict) else range(len(value))
  for key in list(keys):
    found.append((value, key))
    if isinstance(value[key], (dict, list)):
      places(value[key], found)
  return found


def mutate(rng, row, times):
  row = copy.deepcopy(row)
  for _ in range(times):
    spots = places(row)
    if not spots:
      break
    box, key = rng.choice(spots)
    how = rng.randrange(8)
    if how == 0:
      del box[key]
    elif how == 1 and isinstance(box, dict):
      box[rng.choice(NAMES)] = box.pop(key)
    elif how == 2 and isinstance(box, dict):
      box[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
    elif how == 3 and isinstance(box, list):
      box.insert(rng.randrange(len(box) + 1), copy.deepcopy(rng.choice(ODD)))
    elif how == 4:
      box[key] = deep(rng.choice((5, 40, 120, 250)))
    elif how == 5:
      other, name = rng.choice(spots)
      # Not into itself.
      if name in other if isinstance(other, dict) else name < len(other):
        box[key] = json.loads(json.dumps(other[name]))
    elif how == 6:
      box[key] = [box[key]] if rng.random() < 0.5 else {'content': box[key]}
    else:
      box[key] = copy.deepcopy(rng.choice(ODD))
  return row


class Counts:
  """The outcomes of inputs, counted by name."""

  def __init__(self):
    self.counts = collections.Counter()

  def __call__(self, name, call, *args):
    begun = time.monotonic()
    try:
      call(*args)
      outcome = 'read'
    except (ValueError, OSError) as e:
      said = str(e)
      assert said and '\n' not in said, (name, said[:500])
      assert type(e) is not UnicodeDecodeError, (name, said[:500])
      # It can be printed, and clears no screen.
      assert said.isprintable(), (name, said[:500])
      outcome = 'refused'
    assert time.monotonic() - begun < SECONDS, name
    self.counts[name, outcome] += 1

  def tell(self, capsys):
    with capsys.disabled():
      for (name, outcome), count in sorted(self.counts.items()):
        print(f'\nfuzz {name}: {count:,} {outcome}', end='')


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  path = tmp_path_factory.mktemp('words')
  chat_cases.tokenizer(TEMPLATE).save_pretrained(path)
  return HuggingFaceTokenizer(str(path))


def chatting(words):
  used = chat_dataset.ChatTemplate(words.tokenizer)
  return lambda row: used.encode(
    chat_formats.check_answered(chat_formats.parse_conversation(row))
  )


def comparing(words, rng):
  data = config_lib.default().data
  data.source = 'preference'
  made = [
    preference_tokenize.row_encoder(data, CausalCollator(own, 64), None)
    for own in (words, ByteTokenizer())
  ]

  def read(row):
    actual = preference_formats.parse_row(row)
    # Plain text has no words for calls, thoughts and names.
    for encode in made[: 2 if rng.random() < 0.3 else 1]:
      encode(actual.prompt, actual.answers)

  return read


@pytest.mark.parametrize('form', FORMS)
def test_every_mutated_row_is_read_or_refused(form, words, tmp_path, capsys):
  rng, counts = random.Random(f'rows {form}'), Counts()
  path = tmp_path / 'r.jsonl'
  read = {
    'chat': chatting(words),
    'preference': comparing(words, rng),
    'rows': lambda row: example_lib.parse_example(row, 't', rng.random() < 0.5),
    'text': lambda row: documents.read_documents(str(path)),
  }[form]

  def through_a_file(row):
    # As readers get them: what JSON cannot say never reaches a form.
    path.write_text(json.dumps(row))
    for _, actual in jsonl_rows.read_lines(str(path), BadRows()):
      read(actual)

  for i in range(ROWS):
    row = mutate(rng, rng.choice(FORMS[form]), rng.choice((1, 1, 1, 2, 3)))
    counts(f'{form} rows', through_a_file, row)
    if i % 3 == 0 and form != 'text':
      # And as a table or a request gives them.
      counts(f'{form} values', read, row)
  counts.tell(capsys)
  assert counts.counts[f'{form} rows', 'refused'] > ROWS // 20
  assert counts.counts[f'{form} rows', 'read'] > ROWS // 20


def damaged(rng, raw):
  """A file's bytes with something wrong."""
  how = rng.randrange(9)
  at = rng.randrange(len(raw))
  if how == 0:
    return raw[:at]
  if how == 1:
    return raw[:at] + bytes(rng.randrange(256) for _ in range(3)) + raw[at:]
  if how == 2:
    return raw[:at] + raw[at + rng.randrange(1, 9) :]
  if how == 3:
    return raw.decode().encode(rng.choice(('utf-16', 'utf-16-le', 'utf-32')))
  if how == 4:
    return gzip.compress(raw)
  if how == 5:
    packed = bytearray(gzip.compress(raw))
    packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
    return bytes(packed[: rng.randrange(1, len(packed) + 1)])
  if how == 6:
    return b'\xef\xbb\xbf' + raw[:at] + b'\xef\xbb\xbf' + raw[at:]
  if how == 7:
    return raw.replace(b'"', rng.choice((b'', b'""', b"'")), rng.randrange(4))
  return raw[:at] + rng.choice((b'[', b'{', b'(')) * 20000 + raw[at:]


PROMPTS = """dataset: d
subset: s
templates:
  a: !Template
    name: say
    jinja: 'Is {{ a }} {{ b[0] | upper }}? ||| {{ answer_choices[label] }}'
    answer_choices: yes ||| no
    metadata: !TemplateMetadata {original_task: true}
"""
NAMES_OF_FILES = (
  *('r.jsonl', 'r.json', 'r.jsonl.gz', 'r.json.gz', 'r.csv', 'r.csv.gz'),
  *('r.txt', 'r.txt.gz', 'r.yaml'),
)


@pytest.mark.parametrize('name', NAMES_OF_FILES)
def test_every_damaged_file_is_read_or_refused(name, tmp_path, capsys):
  rng, counts = random.Random(f'files {name}'), Counts()
  kind = name.removesuffix('.gz').rpartition('.')[2]
  chats, rows = FORMS['chat'][3:4] * 9, FORMS['rows'][:1] * 9
  csv = 'inputs,targets,n\n"a, b",c,01\nNA,"two\nlines",2\n' * 9
  text = 'Once upon a time.\n\nThere was é.\n' * 9
  readers = {
    'jsonl': (
      (jsonl_rows.read, '\n'.join(map(json.dumps, rows))),
      (dataset_rows.read, '\n'.join(map(json.dumps, rows))),
      (chat_cases.read_conversations, '\n'.join(map(json.dumps, chats))),
    ),
    'json': (
      (chat_cases.read_conversations, json.dumps(chats, indent=1)),
      (dataset_rows.read, json.dumps(rows)),
    ),
    'csv': (
      (dataset_rows.read, csv),
      (lambda path: csv_table.read(path, BadRows('skip')), csv),
    ),
    'txt': ((documents.read_documents, text),),
    'yaml': ((promptsource.read_templates, PROMPTS),),
  }[kind]
  for _ in range(FILES):
    for read, raw in readers:
      whole = damaged(rng, raw.encode())
      if name.endswith('.gz') and rng.random() < 0.7:
        whole = gzip.compress(whole)[: rng.choice((None, None, 30))]
      (tmp_path / name).write_bytes(whole)
      counts(name, read, str(tmp_path / name))
  counts.tell(capsys)
  assert counts.counts[name, 'refused'] > FILES // 20
  assert counts.counts[name, 'read'] > FILES // 20


def test_every_mutated_template_is_read_or_refused(tmp_path, capsys):
  rng, counts = random.Random('templates'), Counts()
  path = tmp_path / 't.yaml'
  jinja = [
    *('{{ a }} ||| {{ b }}', '{{ a.b.c }} ||| x', '{{ a[5] }} ||| x', '|||'),
    *('{{ a | random }} ||| x', '{{ 1 / 0 }} ||| x', '{{ [' * 200, '{% if %}'),
    *('{{ a + b }} ||| x', '{{ (' * 9000 + ' ||| ', '{{ a ** 99999 }} ||| x'),
    *('{{ self }} ||| x', '{{ "%d" % a }} ||| x', '{{ a | int(base=99) }}|||x'),
    *('{{ range(10**9) | list }} ||| x', '{{ a.__class__ }} ||| x'),
    *('{{ "x".format(a) }} ||| {{ "{0.x}".format(a) }}', '{{ none }} ||| x'),
  ]
  fields = {'name': 'say', 'jinja': jinja[0], 'answer_choices': 'yes ||| no'}
  fields['metadata'] = {'original_task': True}

  def read_and_say(rows):
    group = promptsource.read_templates(str(path))
    promptsource.render_templates(group, rows, BadRows('skip'))

  for _ in range(1500):
    row = {'a': 'x', 'b': ['y'], 'label': 1}
    own = dict(fields, jinja=rng.choice(jinja))
    tree = {'dataset': 'd', 'subset': 's', 'templates': {'t': own}}
    if rng.random() < 0.5:
      tree = mutate(rng, tree, 1)
    rows = [mutate(rng, row, rng.randrange(3)) for _ in range(3)]
    # Neither writer knows the halves of pairs.
    text = rng.choice((json.dumps, yaml.safe_dump))(tree)
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    counts('templates', read_and_say, rows)
  counts.tell(capsys)
  assert counts.counts['templates', 'read'] > 100
