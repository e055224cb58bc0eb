# SPDX-License-Identifier: Apache-2.0
"""A dialogue moves through its states by what a message says, and no other."""

import json

import pytest

pytest.importorskip('openai')

from examples.customer_service import chat, evaluate  # noqa: E402
from examples.customer_service.dialogue import (  # noqa: E402
  Dialogue,
  Understanding,
  pattern_slots,
)
from examples.customer_service.understand import ByExamples, ByModel  # noqa: E402
from examples.knowledge_base.answer import NOT_IN_DOCUMENTS, Answer  # noqa: E402
from examples.knowledge_base.search import Embedder  # noqa: E402
from examples.knowledge_base.splitter import Passage  # noqa: E402
from moepeft.agent.chat_model import make_client  # noqa: E402
from tests.agent import scripted  # noqa: E402

from .. import hashing_server  # noqa: E402

TERMS = Answer('30 days.', (Passage('terms.md', 'Terms', '30 days.'),), 1.0)


def dialogue(*contents, answer=TERMS):
  """A dialogue whose messages mean (intent, slots) in turn."""
  script = iter(contents)

  def understand(message, slot):
    intent, slots = next(script)
    return Understanding(intent, slots)

  return Dialogue(understand, lambda question: answer)


def test_slots_are_filled_in_turn_and_confirmed():
  talk = dialogue(
    ('return', {}), ('', {'order': 'KX-12345'}), ('', {'reason': 'damaged'}),
    ('yes', {}),
  )  # fmt: skip
  assert 'number of your order' in talk.respond('I send it back')
  assert 'Why do you return it' in talk.respond('KX-12345')
  reply = talk.respond('broken')
  assert reply == (
    'I note a return of order KX-12345 (damaged). Is that right?'
  )
  assert talk.state == 'confirming'
  talk.respond('yes')
  assert talk.state == 'done'
  assert talk.slots == {'order': 'KX-12345', 'reason': 'damaged'}
  with pytest.raises(ValueError, match='begin another one'):
    talk.respond('hello')


def test_a_question_in_between_keeps_the_slots():
  talk = dialogue(('track', {'order': 'KX-12345'}), ('question', {}))
  talk.respond('Where is KX-12345?')
  assert talk.respond('How long?') == (
    '30 days. [terms.md] What is your e-mail address?'
  )
  assert talk.slots == {'order': 'KX-12345'} and talk.state == 'filling'


def test_a_value_in_a_question_is_taken_and_the_question_answered():
  talk = dialogue(('track', {}), ('question', {'order': 'KX-12345'}))
  talk.respond('Where is it?')
  reply = talk.respond('KX-12345, and how long may it take?')
  assert reply == '30 days. [terms.md] What is your e-mail address?'
  assert talk.slots == {'order': 'KX-12345'}


def test_a_value_is_corrected_before_it_is_confirmed():
  talk = dialogue(
    ('track', {'order': 'KX-12345', 'email': 'a@b.test'}),
    ('', {'order': 'KX-54321'}),
  )
  talk.respond('...')
  assert 'KX-54321' in talk.respond('I mean KX-54321')
  assert talk.state == 'confirming'


def test_without_confirmation_all_is_asked_again():
  talk = dialogue(
    ('track', {'order': 'KX-12345', 'email': 'a@b.test'}), ('no', {})
  )
  talk.respond('...')
  assert 'number of your order' in talk.respond('no')
  assert talk.slots == {} and talk.state == 'filling'


@pytest.mark.parametrize(
  ('contents', 'answer', 'reason'),
  [
    ([('human', {})], TERMS, 'the customer asks for a person'),
    ([('', {})] * 3, TERMS, 'the messages are not understood'),
    # Values without a request that needs them help nothing.
    ([('', {'order': 'KX-12345'})] * 3, TERMS, 'not understood'),
    (
      [('question', {})] * 3,
      Answer(NOT_IN_DOCUMENTS),
      'the documents do not answer it',
    ),
  ],
)
def test_a_person_takes_over(contents, answer, reason):
  talk = dialogue(*contents, answer=answer)
  for i in range(len(contents)):
    assert talk.state != 'handed_over'
    talk.respond(f'message {i}')
  assert talk.state == 'handed_over' and reason in talk.reason
  card = talk.hand_over()
  assert card['transcript'][0] == ('customer', 'message 0')
  assert len(card['transcript']) == 2 * len(contents)
  json.dumps(card)


def test_values_with_a_pattern_are_read_and_not_invented():
  text = 'KX-12345, ada.b@mail.test. It is Mill Road 12, 12345 Arden.'
  assert pattern_slots(text) == {
    'order': 'KX-12345',
    'email': 'ada.b@mail.test',
    'address': 'Mill Road 12, 12345 Arden',
  }
  assert pattern_slots('my order is X-1') == {}


@pytest.fixture(scope='module')
def server():
  content = {'intent': 'return', 'reason': 'damaged'}
  with hashing_server.serving(lambda body: json.dumps(content)) as server:
    yield server


def test_intents_are_those_of_the_nearest_examples(server):
  embed = Embedder(make_client(server.url), hashing_server.EMBEDDINGS)
  understand = ByExamples(embed, threshold=0.35)
  assert understand('Where is my parcel?', '').intent == 'track'
  assert understand('xyzzy plugh', '') == Understanding('', {})
  content = understand('It has a crack. KX-12345', 'reason')
  assert content.slots == {'order': 'KX-12345', 'reason': 'damaged'}


def test_a_models_intent_is_one_of_the_schema():
  reply = scripted.text_reply('{"intent": "return", "reason": ""}')
  with scripted.serving(reply) as script:
    content = ByModel(script.model())('Take KX-12345 back', '')
  assert content == Understanding('return', {'order': 'KX-12345'})
  schema = script.requests[0]['response_format']['json_schema']['schema']
  intents = schema['properties']['intent']['enum']
  assert {'', 'return', 'track', 'human', 'question'} <= set(intents)


def test_customers_have_values_in_their_messages():
  group = list(evaluate.customers(20, seed=5))
  assert {c.goal for c in group} == {
    *('return', 'track', 'address', 'human', 'unknown')
  }
  for customer in group:
    for name in customer.slots.keys() - {'reason'}:
      read = pattern_slots(customer.replies[name])
      assert read[name] == customer.slots[name]


def test_a_customer_who_is_understood_gets_to_the_end():
  customer = next(c for c in evaluate.customers(9, 0) if c.goal == 'track')

  def understand(message, slot):
    if message == customer.confirmation:
      return Understanding('yes', {})
    intents = {customer.opening: 'track'}
    if customer.question:
      intents[customer.question[0]] = 'question'
    return Understanding(intents.get(message, ''), pattern_slots(message))

  result = evaluate.play(Dialogue(understand, lambda q: TERMS), customer)
  assert result.right and result.state == 'done'


def test_the_terminal_ends_with_a_hand_over(server, capsys, monkeypatch):
  lines = ['Where is my parcel?\n', 'I want to speak to a person.\n', 'x\n']
  monkeypatch.setattr('sys.stdin', lines)
  chat.main(server.flags())
  greeting, first, second, card = capsys.readouterr().out.split('\n', 3)
  assert 'number of your order' in first and 'colleague' in second
  assert json.loads(card)['request'] == 'track'


def test_the_evaluation_plays_all_customers(server, capsys):
  evaluate.main([*server.flags(), '--customers=10'])
  out = capsys.readouterr().out
  assert out.count('| examples |') == out.count('| model |') == 5
