# SPDX-License-Identifier: Apache-2.0
"""Truncation of conversations that are longer than a row."""

import pytest

from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat import truncate
from moepeft.data.chat.formats import Conversation, Turn

from ... import chat_cases

# Of bytes: a turn of the user has 6 + 1 + its text's + 2 ids, with the special
# tokens and line ends (system's 9, assistant's 12, tool's 7).
CALL = Turn('assistant', '', [{'name': 'f', 'arguments': {'x': 'y' * 20}}])
TALK = Conversation(
  (
    Turn('system', 'S' * 11),
    Turn('user', 'old'),
    Turn('assistant', 'gone'),
    Turn('user', 'question ' * 3),
    CALL,
    Turn('tool', 'result ' * 5),
    Turn('assistant', 'THE FINAL ANSWER'),
  )
)
HEADER = '<|im_start|>system\n'


@pytest.fixture(scope='module')
def used():
  return chat_dataset.ChatTemplate(chat_cases.tokenizer())


def fitted(used, talk, most, too_long='prompt'):
  actual = truncate.truncate_chat(talk, used.encode, most, too_long)
  if actual is None:
    return None
  assert len(actual.ids) <= most and actual.cut
  return used.tokenizer.decode(actual.ids.tolist())


def without(*turns, **changes):
  return Conversation(tuple(TALK.turns[i] for i in turns))


def text(used, talk):
  return used.render(talk).text


def test_whole_turns_go_from_the_oldest_on(used):
  """The oldest exchange, then the call with what it gave."""
  for turns in ((0, 3, 4, 5, 6), (0, 3, 6)):
    rest = without(*turns)
    most = len(used.encode(rest).ids)
    assert fitted(used, TALK, most) == text(used, rest)


def test_a_question_loses_its_beginning_before_the_system_does(used):
  rest = without(0, 3, 6)
  most = len(used.encode(rest).ids) - 5
  shown = fitted(used, TALK, most)
  assert shown == text(used, rest).replace(
    'question ' * 3, 'ion ' + 'question ' * 2
  )


def test_a_system_loses_its_beginning_where_a_question_is_too_short(used):
  rest = Conversation(
    (Turn('system', 'S' * 99), Turn('user', 'ab'), TALK.turns[-1])
  )
  most = len(used.encode(rest).ids) - 40
  shown = fitted(used, rest, most)
  assert shown == text(used, rest).replace('S' * 99, 'S' * 59)


@pytest.mark.parametrize('most', range(61, 200, 7))
def test_the_last_answer_is_whole_and_no_header_is_torn(used, most):
  shown = fitted(used, TALK, most)
  # 9 + 1 of the system, 7 + 1 of the user, 29 of the answer with its end: 61
  # with the two special tokens and the line's end of each.
  assert shown.startswith(HEADER)
  assert shown.endswith('assistant\nTHE FINAL ANSWER<|im_end|>\n')
  assert shown.count('<|im_start|>') == shown.count('<|im_end|>')


def test_an_answer_is_cut_only_where_it_alone_is_too_long(used):
  talk = Conversation(
    (
      Turn('system', 'S' * 50),
      Turn('user', 'Q' * 50),
      Turn('assistant', 'A' * 200),
    )
  )
  shown = fitted(used, talk, 160)
  # The prompt keeps a quarter: 40 ids, of which 32 are headers and ends.
  before, _, answer = shown.partition('assistant\n')
  assert answer == 'A' * (160 - 40) and shown.startswith(HEADER)
  assert before.count('S') + before.count('Q') > 2


def test_a_row_whose_tools_leave_no_room_is_left_out(used):
  tool = {'type': 'function', 'function': {'name': 'f' * 300}}
  talk = Conversation((Turn('user', 'Q'), Turn('assistant', 'A' * 50)), [tool])
  assert fitted(used, talk, 200) is None


def test_what_follows_the_last_trained_answer_goes_first(used):
  turns = (
    Turn('user', 'Q'),
    Turn('assistant', 'yes'),
    Turn('user', 'R' * 50),
    Turn('assistant', 'no', trained=False),
  )
  shown = fitted(used, Conversation(turns), 60)
  assert shown == text(used, Conversation(turns[:2]))
