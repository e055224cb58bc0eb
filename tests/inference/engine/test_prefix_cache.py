# SPDX-License-Identifier: Apache-2.0
"""What was computed before is used again, and never for another adapter."""

import threading

import jax
import numpy as np
import pytest

from moepeft.inference.api import LENGTH, EngineFull, Token, UnknownAdapter
from moepeft.inference.engine.prefix_cache import PrefixCache

from ..engines import ask, decoder, expected, paused, prompt
from .test_engine import CLOSE, check


def test_a_prompt_asked_again_is_not_read_again(engine):
  ids = prompt(100, 21)
  first = ask(engine, ids, 5, adapter='one', logprobs=2)
  assert first.end.cached == 0
  again = ask(engine, ids, 5, adapter='one', logprobs=2)
  # All but the last, which the first step takes.
  assert again.end.cached == 20 and again.end.prompt == 21
  assert again.tokens == first.tokens
  check(again, ids, expected((*ids, *again.tokens), 'one'), top=2)
  for a, b in zip(first.scored, again.scored, strict=True):
    assert abs(a.logprob - b.logprob) < CLOSE


def test_a_conversation_goes_on_from_its_answers(engine):
  ids = prompt(101, 9)
  first = ask(engine, ids, 6).wait()
  longer = (*ids, *first.tokens, 5, 6, 7)
  second = ask(engine, longer, 4, logprobs=1)
  # Keys and values of the answer's last token were never needed.
  assert second.end.cached == 9 + 5
  check(second, longer, expected((*longer, *second.tokens)), top=1)


def test_a_beginning_is_shared_with_one_that_still_runs(engine):
  ids, beside = prompt(102, 20), []

  def asks(event):
    if isinstance(event, Token) and not beside:
      beside.append(ask(engine, (*ids, 4, 5), 4, logprobs=1))

  first = ask(engine, (*ids, 3), 25, asks)
  rows = expected((*ids, 3, *first.tokens))
  assert first.tokens == rows[20:-1].argmax(-1).tolist()
  assert beside[0].end.cached == 20
  rows = expected((*ids, 4, 5, *beside[0].tokens))
  check(beside[0], (*ids, 4, 5), rows, top=1)


def test_no_cache_is_shared_between_adapters(engine):
  ids = prompt(104, 15)
  for adapter in ('one', 'two', ''):
    asked = ask(engine, ids, 4, adapter=adapter, logprobs=1)
    assert asked.end.cached == 0
    check(asked, ids, expected((*ids, *asked.tokens), adapter), top=1)


def test_a_reloaded_adapter_finds_nothing_of_the_old_one(engine):
  ids = prompt(105, 15)
  engine.load('fresh', 'one')
  old = ask(engine, ids, 4, adapter='fresh').wait()
  # The same name, another content.
  assert engine.load('fresh', 'two').sha256 == 'two'
  new = ask(engine, ids, 4, adapter='fresh', logprobs=1)
  assert new.end.cached == 0
  check(new, ids, expected((*ids, *new.tokens), 'two'), top=1)
  # And another name of what is known.
  same = ask(engine, ids, 4, adapter='two')
  assert same.end.cached == 14 and same.tokens == new.tokens
  assert old.tokens == ask(engine, ids, 4, adapter='one').tokens
  engine.unload('fresh')
  with pytest.raises(UnknownAdapter, match="no adapter 'fresh'"):
    ask(engine, ids, 4, adapter='fresh')


def test_an_adapter_is_unloaded_when_none_waits_for_it(engine):
  engine.load('going', 'one')
  with paused(engine):
    busy = [ask(engine, prompt(i, 3), 9) for i in range(3)]
    waits = ask(engine, prompt(7, 3), 3, adapter='going')
    unload = threading.Thread(target=engine.unload, args=('going',))
    unload.start()
    with engine._condition:
      assert engine._condition.wait_for(
        lambda: 'going' in engine._unloading, 60
      )
    # It has a place in the queue, and no one else gets one.
    with pytest.raises(UnknownAdapter, match="no adapter 'going'"):
      ask(engine, (3,), 1, adapter='going')
  unload.join(60)
  assert not unload.is_alive()
  assert waits.end.reason == LENGTH
  assert [answer.end.reason for answer in busy] == [LENGTH] * 3
  assert 'going' not in [one.name for one in engine.adapters()]
  with pytest.raises(UnknownAdapter):
    engine.unload('going')


def test_a_scored_prompt_is_computed(engine):
  ids = prompt(106, 15)
  ask(engine, ids, 3).wait()
  asked = ask(engine, ids, 3, prompt_logprobs=0)
  assert asked.end.cached == 0 and len(asked.prompt) == 15


def test_experts_are_the_weights_of_the_token_that_was_read(engine):
  model, params, contents = decoder()
  ids = prompt(107, 6)
  asked = ask(
    engine, ids, 3, adapter='one', routing=True, prompt_logprobs=0
  )  # fmt: skip
  whole = np.array([(*ids, *asked.tokens)])
  _, seen = model.apply(
    {'params': params, 'peft': contents['one']},
    {'inputs': whole},
    mutable=['weights'],
  )
  layers = seen['weights']['decoder']['layers']
  (weights,) = layers['self']['q']['molora']['weights']
  # [l, 1, t, e]; the last token is read by nobody.
  weights = jax.device_get(weights)[:, 0, :-1]
  told = [*asked.prompt[1:], *asked.scored]
  for i, token in enumerate(told):
    actual = token.layer_experts['decoder/self/q']
    np.testing.assert_allclose(actual, weights[:, i], atol=CLOSE)
    mean = token.experts['decoder/self/q']
    np.testing.assert_allclose(mean, weights[:, i].mean(0), atol=CLOSE)
  assert len(told) == weights.shape[1]
  # So that one layer's are not another's.
  assert np.abs(weights[0] - weights[1]).max() > 100 * CLOSE
  # The base routes nowhere, and who does not ask is not told.
  assert ask(engine, ids, 1, routing=True).scored[0].experts is None
  assert ask(engine, ids, 1, adapter='one').scored[0].experts is None


def test_a_slot_is_taken_over_where_little_is_lost():
  texts = PrefixCache(2)
  first = texts.take((), 'a').slot
  first.ids = [*range(40)]
  texts.release(first)
  # Half of what it holds is wanted: taken over, cut to that.
  place = texts.take((*range(20), 99), 'a')
  assert place.slot is first and place.source is None
  assert place.slot.ids == [*range(20)]


def test_a_long_text_is_copied_from_rather_than_lost():
  texts = PrefixCache(3)
  first = texts.take((), 'a').slot
  first.ids = [*range(40)]
  texts.release(first)
  place = texts.take((*range(17), 99), 'a')
  assert place.source is first and place.slot is not first
  assert place.slot.ids == [*range(17)]
  # Too short for a copy: computed anew, in the slot that has nothing to lose.
  third = texts.take((*range(15), 99), 'a')
  assert third.source is None and third.slot.ids == []
  assert first.ids == [*range(40)] and not first.busy


def test_a_text_of_another_adapter_is_none():
  texts = PrefixCache(1)
  slot = texts.take((), 'a').slot
  slot.ids = [1, 2, 3]
  texts.release(slot)
  assert slot.common_prefix([1, 2, 3], 'b') == 0
  assert slot.common_prefix([1, 2, 4], 'a') == 2
  assert slot.common_prefix([1, 2], 'a') == 2
  assert texts.take([1, 2, 3], 'b').slot.ids == []


def test_no_slot_is_given_twice():
  texts = PrefixCache(1)
  texts.take((), '')
  assert texts.free() == 0
  with pytest.raises(ValueError, match='no slot is free'):
    texts.take((), '')


def test_who_waits_for_a_full_form_holds_up_nobody_else(engine, monkeypatch):
  banks, hold = engine._adapters, engine._adapters.acquire
  room = threading.Event()

  def full(name):
    if name == 'one' and not room.is_set():
      raise EngineFull('requests use every slot of its form', 1.0)
    return hold(name)

  monkeypatch.setattr(banks, 'acquire', full)
  with paused(engine):
    first, second = (
      ask(engine, prompt(i, 3), 2, adapter='one') for i in (1, 2)
    )
    base = ask(engine, prompt(3, 3), 2)
  assert base.end.reason == LENGTH
  assert not first.events and not second.events
  room.set()
  # The engine looks again when something happens.
  assert ask(engine, prompt(4, 3), 2).end.reason == LENGTH
  assert first.end.reason == second.end.reason == LENGTH
