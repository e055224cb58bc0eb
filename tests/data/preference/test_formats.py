# SPDX-License-Identifier: Apache-2.0
"""Forms of preference rows, and what of a row is refused in a sentence."""

import pytest

from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow
from moepeft.data.preference.formats import (
  ComparedRow,
  JudgedRow,
  parse_row,
  split_pair,
)

ASKED = Conversation((Turn('user', 'Why?'),))
SO, NO = (Turn('assistant', text) for text in ('So.', 'No.'))
USER = {'role': 'user', 'content': 'Why?'}
GOOD = {'role': 'assistant', 'content': 'So.'}
BAD = {'role': 'assistant', 'content': 'No.'}
HUMAN = {'from': 'human', 'value': 'Why?'}
GPT = {'from': 'gpt', 'value': 'So.'}
PAIR = {'chosen': 'So.', 'rejected': 'No.'}


@pytest.mark.parametrize(
  'fields',
  [
    {
      'conversations': [HUMAN],
      'chosen': GPT,
      'rejected': {'from': 'gpt', 'value': 'No.'},
    },
    {'prompt': 'Why?'} | PAIR,
    {'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]},
    {'prompt': [USER]} | PAIR,
    # The prompt in the answers' lists, beside a text of it or not.
    {'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
    {'prompt': 'Why?', 'chosen': [USER, GOOD], 'rejected': [USER, BAD]},
    {'messages': [USER], 'chosen': GOOD, 'rejected': BAD},
    {'instruction': 'Why?', 'input': ''} | PAIR,
    # As a table holds it: fields that other rows have are None.
    {'prompt': 'Why?', 'messages': None} | PAIR,
  ],
)
def test_every_form_of_a_pair_is_the_same_pair(fields):
  assert parse_row(fields) == ComparedRow(ASKED, SO, NO)


@pytest.mark.parametrize(
  'fields',
  [
    {'messages': [USER, GOOD], 'label': True},
    {'conversations': [HUMAN, GPT], 'kto_tag': True},
    {'prompt': 'Why?', 'completion': 'So.', 'label': True},
    {'prompt': [USER], 'completion': [GOOD], 'label': True},
    {'instruction': 'Why?', 'output': 'So.', 'kto_tag': True},
  ],
)
def test_every_form_of_a_judged_answer_is_the_same(fields):
  assert parse_row(fields) == JudgedRow(ASKED, SO, True)


def test_turns_before_the_answer_stay_in_the_prompt():
  fields = {
    'system': 'Be brief.',
    'conversations': [HUMAN, GPT, {'from': 'human', 'value': 'And?'}],
  }
  actual = parse_row(fields | PAIR)
  said = [(t.role, t.content) for t in actual.prompt.turns]
  assert said == [
    ('system', 'Be brief.'),
    ('user', 'Why?'),
    ('assistant', 'So.'),
    ('user', 'And?'),
  ]
  alpaca = {
    'instruction': 'Add',
    'input': '1 2',
    'history': [['Hi', 'Yes?']],
  }
  contents = [t.content for t in parse_row(alpaca | PAIR).prompt.turns]
  assert contents == ['Hi', 'Yes?', 'Add\n1 2']


def test_a_pair_is_a_good_and_a_bad_answer():
  good, bad = split_pair(ComparedRow(ASKED, SO, NO, 7))
  assert good == JudgedRow(ASKED, SO, True, 7)
  assert bad == JudgedRow(ASKED, NO, False, 7)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'topic': 'Why?'}, "'messages' or 'prompt'; got topic"),
    ({}, 'got no field'),
    ({'prompt': 'Why?', 'chosen': 'So.'}, "there is no 'rejected'"),
    ({'prompt': 'Why?'}, "an answer with a 'label'; got prompt"),
    ({'prompt': 'Why?', 'chosen': 'A', 'rejected': 'A'}, 'are the same'),
    ({'prompt': 'Why?', 'chosen': ' ', 'rejected': 'A'}, "'chosen' is empty"),
    ({'prompt': '', 'chosen': 'B', 'rejected': 'A'}, "'prompt' is empty"),
    ({'prompt': 'Why?', 'chosen': '\ud800', 'rejected': 'A'}, 'half of a char'),
    ({'prompt': 3, 'chosen': 'B', 'rejected': 'A'}, 'list of turns'),
    ({'conversations': []} | PAIR, 'list of turns'),
    (PAIR, "there is no prompt: expected one in 'prompt'"),
    ({'rejected': [USER, BAD]}, "there is no 'chosen'; mend"),
    ({'completion': 'So.', 'label': True}, "'messages' or 'prompt'; got compl"),
    ({'prompt': 'Why?', 'label': True}, 'got that of user; mend or remove'),
    (
      {'conversations': ['Why?']} | PAIR,
      'turn 0 is .Why.., expected an object',
    ),
    ({'conversations': [{'value': 'Why?'}]} | PAIR, 'turn 0 has the role None'),
    ({'conversations': [{'from': 'human'}]} | PAIR, 'turn 0 .user. is None'),
    ({'conversations': [HUMAN, GPT]} | PAIR, "last turn is the user's"),
    ({'instruction': 'Why?', 'input': 3} | PAIR, "'input' is 3, expected text"),
    ({'instruction': 'Why?', 'label': True}, "the answer in 'output'"),
    ({'messages': [USER, GOOD], 'label': 1}, "true or false in 'label', got 1"),
    ({'messages': [USER], 'label': True}, 'answer as the last turn'),
    (
      {'chosen': [USER, GOOD], 'rejected': [dict(USER, content='?'), BAD]},
      'differ before their last turn',
    ),
    (
      {'prompt': 'Why?', 'chosen': [USER], 'rejected': [BAD]},
      "assistant's answer",
    ),
  ],
)
def test_a_broken_row_is_one_sentence(fields, said):
  with pytest.raises(BadRow, match=said):
    parse_row(fields)


def test_a_form_that_is_not_there_is_named():
  with pytest.raises(ValueError, match='one of alpaca, sharegpt, messages'):
    parse_row({'prompt': 'Why?'}, 'sharegtp')
