# SPDX-License-Identifier: Apache-2.0
"""Conversations, pairs and a text that ship with the package."""

import importlib
import json
import re
import sys

import pytest

from moepeft import config as config_lib
from moepeft.core.files import ASSETS, local_path
from moepeft.data import fingerprint
from moepeft.data.batching import collators
from moepeft.data.preference import dataset as preference_dataset
from moepeft.data.sources import open_data
from moepeft.data.text import documents
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.models import FAMILIES
from moepeft.objectives import OBJECTIVES
from tests import ROOT

from .. import chat_cases

_SCRIPTS = ROOT / 'scripts'
_FILES = {
  'chats': ASSETS / 'chats' / 'chats.jsonl',
  'pairs': ASSETS / 'pairs' / 'pairs.jsonl',
  'text': ASSETS / 'text' / 'text.txt',
}


def rows_of(name):
  lines = _FILES[name].read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """A tokenizer of bytes with ChatML."""
  tokenizer = chat_cases.tokenizer()
  tokenizer.chat_template = chat_cases.CHATML
  folder = str(tmp_path_factory.mktemp('tokenizer'))
  tokenizer.save_pretrained(folder)
  return HuggingFaceTokenizer(folder)


def read(words, source, objective, **changes):
  """(form, sources) of a config of the shipped data."""
  config = config_lib.default()
  config.objective, config.data.source = objective, source
  config.data.length, config.data.validation_fraction = 1024, 0.1
  config.data.update(changes)
  form = collators.make_model_collator(
    config.data, words, FAMILIES['llama'].config('tiny'), config.seed
  )
  form = preference_dataset.objective_collator(
    config.data, objective, OBJECTIVES[objective].batch, form
  )
  return form, open_data(config.data, config.seed, vocab_size=0, collator=form)


@pytest.mark.parametrize('name', _FILES)
def test_the_script_writes_the_file_that_ships(name, monkeypatch):
  monkeypatch.syspath_prepend(str(_SCRIPTS))
  script = importlib.import_module(f'make_{name}')
  monkeypatch.delitem(sys.modules, f'make_{name}')
  assert _FILES[name] == script.OUTPUT
  assert _FILES[name].read_text(encoding='utf-8') == script.text()


def test_the_files_are_small():
  assert sum(file.stat().st_size for file in _FILES.values()) < 300_000


def test_two_hundred_conversations_are_all_read_and_all_differ(words):
  assert len(rows_of('chats')) == 200
  actual = chat_cases.read_conversations('package:chats')
  prompts = {talk.turns[: len(talk.turns) - 1] for talk in actual}
  assert len(prompts) == len(actual) == 200
  _, got = read(words, 'chat', 'causal', path='package:chats')
  # None is cut, dropped or skipped.
  assert len(got.notes) == 1
  assert got.notes[0] == 'package:chats: 200 conversations'
  assert len(got.held_out) == 20


def test_two_hundred_pairs_are_all_read_and_all_differ(words):
  rows = rows_of('pairs')
  assert len({row['prompt'] for row in rows}) == len(rows) == 200
  assert all(row['chosen'] != row['rejected'] for row in rows)
  form, got = read(words, 'preference', 'dpo', path='package:pairs')
  assert len(got.preferences.items) == 200
  assert len(got.held_out) == 20


def test_prompts_of_pairs_are_not_those_of_conversations():
  asked = {
    turn['content']
    for row in rows_of('chats')
    for turn in row['messages']
    if turn['role'] == 'user'
  }
  assert asked.isdisjoint(row['prompt'] for row in rows_of('pairs'))


def test_the_text_has_no_passage_twice():
  (document,), _ = documents.read_documents('package:text')
  assert len(set(document.passages)) == len(document.passages) > 300


def test_a_twentieth_and_more_of_each_file_is_chinese():
  for file in _FILES.values():
    parts = re.split(r'\n+', file.read_text(encoding='utf-8').strip())
    chinese = [part for part in parts if re.search('[一-鿿]', part)]
    assert len(chinese) > len(parts) / 20, file


def sums(text):
  """(left side, right side) of every sum or product that a text spells."""
  for left, right in re.findall(r'(\d+(?: [-+] \d+)+) = (\d+)', text):
    parts = left.split()
    value = int(parts[0])
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
      value += int(number) if sign == '+' else -int(number)
    yield value, int(right)
  for one, two, product in re.findall(r'(\d+) times (\d+) is (\d+)', text):
    yield int(one) * int(two), int(product)
  for one, two, rest in re.findall(r'(\d+) minus (\d+) is (\d+)', text):
    yield int(one) - int(two), int(rest)
  for one, two, total in re.findall(r'(\d+)加(\d+)等于(\d+)', text):
    yield int(one) + int(two), int(total)
  for one, two, product in re.findall(r'(\d+)乘以(\d+)等于(\d+)', text):
    yield int(one) * int(two), int(product)


def test_every_sum_that_is_to_be_learned_is_right():
  texts = [row['chosen'] for row in rows_of('pairs')]
  for row in rows_of('chats'):
    texts += [m['content'] for m in row['messages'] if m['role'] != 'user']
  actual = [pair for text in texts for pair in sums(text)]
  assert len(actual) > 60
  assert [(a, b) for a, b in actual if a != b] == []


def test_every_day_of_selling_in_the_text_adds_up():
  text = _FILES['text'].read_text(encoding='utf-8')
  pattern = (
    r'with (\d+) \w+\. (\d+) were sold before noon and (\d+) after it, at '
    r'(\d+) coins each\. In the evening (\d+) \w+ were left, and there were '
    r'(\d+) coins'
  )
  days = [tuple(map(int, day)) for day in re.findall(pattern, text)]
  assert len(days) > 50
  for start, first, second, price, left, coins in days:
    assert left == start - first - second
    assert coins == price * (first + second)


def test_what_ships_has_a_hash_of_its_file():
  data = config_lib.default().data
  data.source, data.path = 'chat', 'package:chats'
  expected = fingerprint.sha256(str(_FILES['chats']))
  assert fingerprint.data_hashes(data) == {'path': {'chats.jsonl': expected}}


@pytest.mark.parametrize('name', ['chat', '', '../assets', 'chats/', '.'])
def test_only_what_ships_has_a_name(name):
  with pytest.raises(ValueError, match='one of chats, pairs, t5_tiny, text'):
    local_path(f'package:{name}')
