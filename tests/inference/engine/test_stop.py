# SPDX-License-Identifier: Apache-2.0
"""Every request ends once, and leaves nothing behind, however it ends."""

import random

import jax
import numpy as np
import pytest

from moepeft.inference.api import (
  CANCELLED,
  FAILED,
  LENGTH,
  STOP,
  TIME,
  EngineFull,
  Finished,
  PromptTooLong,
  RequestRefused,
  Token,
  UnknownAdapter,
)
from moepeft.inference.sampling import Sampling

from ..engines import LENGTH as PLACES
from ..engines import V, ask, idle, paused, prompt


class Only:
  """A constraint: one token after the other, then the end."""

  def __init__(self, tokens, size=V, broken=False):
    self.left, self.size, self.broken = list(tokens), size, broken

  def mask(self):
    mask = np.zeros(self.size, bool)
    if not self.broken:
      mask[self.left[0]] = True
    return mask

  def accept(self, token):
    assert token == self.left.pop(0)
    return not self.left


def test_a_constraint_holds_for_its_request_alone(engine):
  ids = prompt(1, 5)
  free = ask(engine, ids, 4).tokens
  # A tokenizer may have fewer ids than the model's padded vocabulary.
  asked = ask(engine, ids, 9, constraint=Only([30, 2, 2, 7], 31), logprobs=1)
  drawn = Sampling(temperature=2.0)
  other = ask(engine, ids, 9, constraint=Only([5, 6]), sampling=drawn)
  beside = ask(engine, ids, 4)
  assert asked.tokens == [30, 2, 2, 7] and asked.end.reason == STOP
  assert other.tokens == [5, 6] and other.end.reason == STOP
  assert beside.tokens == free
  # The model's own, as if nothing were masked.
  assert asked.scored[0].logprob < asked.scored[0].top[0][1]


def test_a_constraint_that_fails_ends_its_request_alone(engine):
  ids = prompt(2, 5)
  free = ask(engine, ids, 4).tokens
  asked = ask(engine, ids, 4, constraint=Only([3, 4], broken=True))
  beside = ask(engine, ids, 4)
  assert asked.end.reason == FAILED
  assert asked.end.message == 'the constraint allows no token of the vocabulary'
  assert beside.tokens == free


def test_a_cancelled_request_ends_with_the_step_and_frees_its_slot(engine):
  def cancels(id):
    return lambda event: isinstance(event, Token) and engine.cancel(id)

  ids = [f'cancelled {i}' for i in range(4)]
  # More than there are slots.
  asked = [ask(engine, prompt(3, 3), 40, cancels(id), id=id) for id in ids]
  for answer in asked:
    assert answer.end.reason == CANCELLED and len(answer.tokens) == 1
  assert ask(engine, prompt(9, 3), 2).end.reason == LENGTH
  engine.cancel('nobody')


def test_a_request_may_be_cancelled_while_it_waits(engine):
  with paused(engine):
    running = [ask(engine, prompt(i, 3), 9) for i in range(3)]
    waits = ask(engine, prompt(5, 3), 9)
    engine.cancel(waits.id)
  assert waits.end.reason == CANCELLED and waits.tokens == []
  assert [answer.end.reason for answer in running] == [LENGTH] * 3


def test_time_is_counted_from_the_asking(engine):
  running = [ask(engine, prompt(i, 3), 40) for i in range(3)]
  late = ask(engine, prompt(5, 3), 40, timeout=1e-9)
  assert late.end.reason == TIME and late.tokens == []
  assert [answer.end.reason for answer in running] == [LENGTH] * 3


def test_a_listener_that_fails_is_gone(engine):
  def fails(event):
    raise RuntimeError('the loop is closed')

  gone = ask(engine, prompt(3, 3), 40, fails)
  assert gone.end.reason == CANCELLED and len(gone.tokens) == 1
  assert ask(engine, prompt(4, 3), 4).end.reason == LENGTH


def test_numbers_that_are_none_end_their_request_alone(engine):
  good = prompt(6, 20)
  free = ask(engine, good, 4, adapter='one').tokens
  for _ in range(2):
    # Long ones, in every slot; some are scored, where it shows earlier.
    asked = [
      ask(engine, prompt(i, 30), 4, adapter='broken', prompt_logprobs=1)
      if i == 1
      else ask(engine, prompt(i, 30), 4, adapter='broken')
      for i in range(3)
    ]
    beside = ask(engine, good, 4, adapter='one')
    for answer in asked:
      assert answer.end.reason == FAILED and not answer.tokens
      assert 'NaN or infinite' in answer.end.message
    assert beside.tokens == free
  # A NaN left in a slot would reach these: a weight of zero times NaN is NaN.
  after = [ask(engine, prompt(i, 2), 4) for i in range(3)]
  assert [answer.end.reason for answer in after] == [LENGTH] * 3


def test_what_was_cancelled_before_it_was_looked_at_leaves_no_nan(engine):
  # Each has read some chunks when its time is over, or had no turn.
  with paused(engine):
    asked = [ask(engine, prompt(i, 40), 4, adapter='broken') for i in range(3)]
  for answer in asked:
    engine.cancel(answer.id)
  after = [ask(engine, prompt(i, 2), 4) for i in range(3)]
  assert [answer.end.reason for answer in after] == [LENGTH] * 3


@pytest.mark.parametrize(
  'options, error, says',
  [
    (dict(ids=()), RequestRefused, 'the prompt has no token'),
    (dict(ids=(V,)), RequestRefused, f'tokens are from 0 to {V - 1}'),
    (dict(ids=(-1,)), RequestRefused, 'the prompt has -1'),
    (dict(max_new_tokens=0), RequestRefused, 'at least 1 token'),
    (dict(max_new_tokens=PLACES), PromptTooLong, f'takes {PLACES} for both'),
    (dict(adapter='three'), UnknownAdapter, "there is no adapter 'three'"),
    (dict(logprobs=21), RequestRefused, 'logprobs is from 0 to 20'),
    (dict(prompt_logprobs=-1), RequestRefused, 'prompt_logprobs is from 0'),
    (dict(timeout=0.0), RequestRefused, 'timeout is above 0 s'),
    (
      dict(sampling=Sampling(top_p=0.5)),
      RequestRefused,
      'without a temperature',
    ),
    (
      dict(sampling=Sampling(temperature=-1.0)),
      RequestRefused,
      'temperature is',
    ),
  ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(
  engine, options, error, says
):
  options = dict(ids=(3, 4)) | options
  with pytest.raises(error, match=says) as e:
    ask(engine, **options)
  assert type(e.value) is error
  assert len(str(e.value).splitlines()) == 1


def test_an_id_is_of_one_request_at_a_time(engine):
  with paused(engine):
    asked = ask(engine, prompt(1, 3), 4, id='same')
    with pytest.raises(RequestRefused, match='already in progress'):
      ask(engine, prompt(1, 3), 2, id='same')
  assert asked.end.reason == LENGTH


def test_a_full_queue_says_when_to_come_back(engine):
  with paused(engine):
    # 3 slots and a queue of 40.
    answers = [ask(engine, prompt(i, 3), 2) for i in range(43)]
    with pytest.raises(EngineFull, match='43 requests wait already') as e:
      ask(engine, prompt(1, 3), 2)
    assert engine.stats().waiting == 43 and engine.stats().running == 0
  assert e.value.seconds >= 1
  assert {answer.end.reason for answer in answers} == {LENGTH}
  assert ask(engine, prompt(1, 3), 2).end.reason == LENGTH


def test_clients_take_turns(engine):
  order = []

  def ends(name):
    return lambda event: isinstance(event, Finished) and order.append(name)

  with paused(engine):
    asked = [
      ask(engine, prompt(i, 3), 3, ends(f'many {i}'), client='many')
      for i in range(9)
    ]
    asked.append(ask(engine, prompt(1, 3), 3, ends('one'), client='one'))
  for answer in asked:
    assert answer.end.reason == LENGTH
  # The second to get a slot, of three that were given at once.
  assert sorted(order[:3]) == ['many 0', 'many 1', 'one']
  assert order[3:] == [f'many {i}' for i in range(2, 9)]


def test_nothing_is_compiled_once_it_is_ready(engine):
  compiled = engine.stats().compiled
  actual = []

  def listen(event, *args, **kwargs):
    if 'compile' in event:
      actual.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda a: a + compiled)(np.float32(1))
    assert actual, 'the listener hears no compilation'
    actual.clear()
    s = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    asked = [
      ask(
        engine, prompt(i, 1 + 5 * i), 4, adapter=('', 'one')[i % 2], logprobs=3,
        sampling=s if i % 3 else Sampling(), routing=True,
        prompt_logprobs=2 if i == 4 else None,
        constraint=Only([3, 4, 5, 6]) if i == 5 else None,
      )
      for i in range(8)
    ]  # fmt: skip
    assert all(answer.end.reason in (LENGTH, STOP) for answer in asked)
    assert actual == [] and engine.stats().compiled == compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_random_traffic_ends_every_request_once_and_frees_all(engine):
  before = engine.stats()
  chance, answers = random.Random(7), []
  for i in range(120):
    options = dict(
      adapter=chance.choice(('', 'one', 'two', 'broken')),
      client=str(chance.randrange(4)),
      timeout=chance.choice((None, None, 1e-9, 0.01, 60.0)),
      sampling=chance.choice((Sampling(), Sampling(temperature=1.0))),
      prompt_logprobs=chance.choice((None, None, 1)),
    )
    size = chance.randrange(1, 30)
    try:
      answers.append(
        ask(engine, prompt(i % 5, size), chance.randrange(1, 12), **options)
      )
    except EngineFull:
      answers[chance.randrange(len(answers))].wait()
    if chance.random() < 0.3:
      engine.cancel(chance.choice(answers).id)
  for answer in answers:
    end = answer.end
    assert end.answer == len(answer.tokens)
    assert (end.reason == FAILED) == bool(end.message)
  assert ask(engine, (3,), 1).end.reason == LENGTH
  after = engine.stats()
  ended = sum(after.finished.values()) - sum(before.finished.values())
  assert ended == len(answers) + 1
  assert wait_idle(engine) and after.compiled == before.compiled


def wait_idle(engine):
  """The last event is told before the request is forgotten."""
  with engine._condition:
    assert engine._condition.wait_for(lambda: not engine._sequences, 30)
  return idle(engine)
