# SPDX-License-Identifier: Apache-2.0
"""Rows of one prompt are trained or held out together."""

import json
import re

import numpy as np
import pytest

from moepeft.data import TrainingData, split
from moepeft.data.sources import open_data
from moepeft.tasks import Example

from .chat import test_chat
from .preference import test_dataset as test_answers


@pytest.mark.parametrize('share', [0.0, 0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize('count', [1, 2, 10, 97])
def test_without_repeats_the_last_rows_are_held_out(count, share):
  out = split.hold_out_last(range(count), share)
  cut = count - round(count * share)
  assert out == [place >= cut for place in range(count)]


def test_rows_of_one_prompt_stay_together_in_about_the_share():
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, 211, 997).tolist()
  out = split.hold_out_last(prompts, 0.1)
  away = {p for p, gone in zip(prompts, out, strict=True) if gone}
  remaining = {p for p, gone in zip(prompts, out, strict=True) if not gone}
  assert away and not away & remaining
  # Prompts have five rows on average, so no more than some are missed.
  assert abs(sum(out) - 99.7) <= 5


def test_a_prompt_of_most_rows_is_trained():
  # The one row of 'b' is the quarter of four, rounded; 'a' has three.
  assert split.hold_out_last(['b', 'a', 'a', 'a'], 0.25) == [
    True,
    False,
    False,
    False,
  ]


@pytest.mark.parametrize('judged', [False, True])
def test_no_prompt_of_preferences_is_on_both_sides(tmp_path, judged):
  rows = [
    {'prompt': f'prompt {i % 5}', 'chosen': f'g{i}', 'rejected': f'b{i}'}
    for i in range(20)
  ]
  data = test_answers.data_of(tmp_path, rows, validation_fraction=0.2)
  own = test_answers.samples(judged=judged)
  actual = open_data(data, 0, collator=own)

  def prompts(items):
    return {test_answers.said(item.sides[0])[0] for item in items}

  count = 40 if judged else 20
  trained = prompts(actual.train[i] for i in range(count))
  # A fifth of the rows are those of one of the five prompts: the last.
  assert prompts(actual.held_out) == {'prompt 4\n'}
  assert trained == {f'prompt {i}\n' for i in range(4)}
  assert len(actual.held_out) == count // 5


def test_conversations_that_begin_alike_are_held_out_together(tmp_path):
  from .. import chat_cases

  saved = tmp_path / 'tokenizer'
  chat_cases.tokenizer().save_pretrained(saved)
  rows = [
    {'instruction': f'say {i % 4}', 'output': f'answer {i}'} for i in range(8)
  ]
  # The same question of another system is another prompt.
  rows.append({'instruction': 'say 0', 'output': 'x', 'system': 'be kind'})
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  path = str(tmp_path / 'rows.json')
  actual, tokenizer = test_chat.opened(
    path, str(saved), validation_fraction=0.3
  )
  shown = [test_chat.trained(s, tokenizer) for s in actual.held_out]
  assert len(shown) == 3
  assert sum('say 3' in text for text in shown) == 2
  assert 'be kind' in ''.join(shown)
  rest = {test_chat.trained(actual.train[i], tokenizer) for i in range(6)}
  assert len(rest) == 6 and not any('say 3' in text for text in rest)


def test_held_out_conversations_have_the_name_of_their_file(tmp_path):
  from .. import chat_cases

  saved = tmp_path / 'tokenizer'
  chat_cases.tokenizer().save_pretrained(saved)
  (tmp_path / 'chats').mkdir()
  for name in 'ab':
    rows = [{'instruction': f'{name} {i}', 'output': 'x'} for i in range(4)]
    (tmp_path / 'chats' / f'{name}.json').write_text(json.dumps(rows))
  actual, tokenizer = test_chat.opened(
    str(tmp_path / 'chats'), str(saved), validation_fraction=0.5
  )
  by_dataset = actual.held_out_by_dataset('chats')
  assert {
    name: re.findall(
      r'[ab] \d', ''.join(tokenizer.decode(s.ids) for s in samples)
    )
    for name, samples in by_dataset.items()
  } == {'a.json': ['a 2', 'a 3'], 'b.json': ['b 2', 'b 3']}


def test_held_out_examples_name_their_dataset_and_texts_have_one():
  def held_out(items):
    data = TrainingData(None, {}, held_out=items)
    return data.held_out_by_dataset('x')

  a, b = (Example(task, '', -1, '', '', (), -1) for task in 'ab')
  assert held_out([a, b, a]) == {'a': [a, a], 'b': [b]}
  assert held_out(['text', 'text']) == {'x': ['text', 'text']}
  assert held_out(()) == {}
