# SPDX-License-Identifier: Apache-2.0
"""An engine's start and end, and what it does when a computation breaks."""

import dataclasses
import threading

import jax
import pytest

from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import (
  CANCELLED,
  FAILED,
  LENGTH,
  Request,
  RequestRefused,
)
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.fair_queue import FairQueue
from moepeft.inference.engine.limits import EngineConfig
from moepeft.models.decoder.model import Decoder

from ...contracts import small_decoders
from ..engines import ask, idle, paused, prompt, running

CONFIG = dataclasses.replace(
  small_decoders.CONFIGS['llama'], layers=1, length=31
)
SETTINGS = EngineConfig(
  slots=2,
  max_model_len=31,
  queue=5,
  chunk=4,
  min_chunk=4,
  cache_lens=(31,),
  batch_sizes=(2,),
)


def small():
  _, variables = small_decoders.make(CONFIG)
  return (
    Decoder(CONFIG),
    variables['params'],
    FixedAdapter(Decoder(CONFIG)),
    SETTINGS,
  )


@pytest.fixture(scope='module')
def engine():
  """For tests after which it goes on."""
  with running(*small()) as actual:
    yield actual


def failing(engine, monkeypatch, name, times, take=False):
  """Lets calls of a program fail; the rest go through."""
  real, left = getattr(engine._core.runner, name), [times]

  def call(*args):
    if left[0]:
      left[0] -= 1
      if take:
        for leaf in jax.tree.leaves(engine._core.runner._cache):
          leaf.delete()
      raise RuntimeError('out of memory\nand a long trace')
    return real(*args)

  monkeypatch.setattr(engine._core.runner, name, call)


def test_it_starts_with_a_generation_and_ends_with_what_is_under_way():
  engine, told = Engine(*small()), []
  with pytest.raises(RequestRefused, match='has not started'):
    engine.submit(Request('early', (3,), 2), lambda event: None)
  assert not engine.ready and engine.stats().compiled == 0
  engine.start(lambda *args: told.append(args))
  assert engine.ready
  every = engine.stats().compiled
  assert [done for _, done, _ in told] == [*range(every)]
  assert {count for *_, count in told} == {every}
  # That generation is nobody's request.
  assert engine.stats().finished == {}
  with pytest.raises(ValueError, match='started already'):
    engine.start()
  with paused(engine):
    asked = [ask(engine, prompt(i, 3), 28) for i in range(4)]
    stop = threading.Thread(target=engine.stop)
    stop.start()
    with engine._condition:
      assert engine._condition.wait_for(lambda: engine._stopped, 60)
  stop.join(60)
  assert not stop.is_alive()
  assert {answer.end.reason for answer in asked} == {CANCELLED}
  assert not engine.ready and idle(engine)
  with pytest.raises(RequestRefused, match='shutting down'):
    ask(engine, (3,), 1)
  with pytest.raises(ValueError):
    engine.load('late', 'path')


def test_it_drains():
  with running(*small()) as engine:
    with paused(engine):
      asked = [ask(engine, prompt(i, 3), 28) for i in range(4)]
      # No longer than it was given.
      assert engine.drain(0.0) is False
    assert engine.drain(60) is True
    # Who had been taken was answered; no one else is.
    assert {answer.events[-1].reason for answer in asked} == {LENGTH}
    with pytest.raises(RequestRefused, match='shutting down'):
      ask(engine, (3,), 1)
    assert not engine.ready


def test_a_failed_start_is_said():
  model, params, banks, settings = small()
  params = jax.tree.map(lambda a: a * float('nan'), params)
  engine = Engine(model, params, banks, settings)
  with pytest.raises(RuntimeError, match='test request failed.*NaN'):
    engine.start()
  assert not engine.ready
  engine.stop()


@pytest.mark.parametrize('take', [False, True])
def test_a_failed_step_ends_its_requests_alone(engine, monkeypatch, take):
  free = ask(engine, prompt(9, 5), 4).tokens
  failing(engine, monkeypatch, 'decode', 1, take)
  failed = ask(engine, prompt(1, 3), 9)
  assert failed.end.reason == FAILED
  assert failed.end.message == 'RuntimeError: out of memory'
  # Though the cache may be gone: a prompt that was known is read anew.
  after = ask(engine, prompt(9, 5), 4)
  assert after.tokens == free
  assert after.end.cached == (0 if take else 4)
  assert engine.ready


def test_a_failed_chunk_ends_its_request_alone(engine, monkeypatch):
  free = ask(engine, prompt(9, 5), 9).tokens
  failing(engine, monkeypatch, 'prefill', 1)
  failed = ask(engine, prompt(1, 12), 9)
  beside = ask(engine, prompt(9, 5), 9)
  assert failed.end.reason == FAILED and beside.tokens == free
  assert ask(engine, prompt(1, 12), 1).end.reason == LENGTH


def test_an_engine_that_only_fails_says_that_it_is_broken(monkeypatch):
  with running(*small()) as engine:
    failing(engine, monkeypatch, 'decode', -1)
    for i in range(4):
      assert ask(engine, prompt(i, 3), 9).end.reason == FAILED
    with pytest.raises(RequestRefused, match='stopped.*out of memory'):
      # The last event comes before the engine has looked back.
      for _ in range(100):
        ask(engine, (3,), 1).wait()
    assert not engine.ready


def test_clients_take_turns_and_keep_their_order():
  turns = FairQueue()
  for client, item in (*[('a', i) for i in range(4)], ('b', 10), ('c', 20)):
    turns.put(client, item)
  turns.put('b', 11)
  turns.remove('a', 2)
  assert len(turns) == 6 and sorted(turns) == [0, 1, 3, 10, 11, 20]
  actual = [turns.take() for _ in range(3)]
  assert actual == [0, 10, 20]
  # Who was taken too early is the next again.
  turns.put_back('c', 20)
  assert [turns.take() for _ in range(4)] == [20, 1, 11, 3]
  assert len(turns) == 0
  with pytest.raises(IndexError, match='nothing waits'):
    turns.take()


@pytest.mark.parametrize(
  'options, says',
  [
    (dict(slots=0), 'slots is at least 1'),
    (dict(chunk=12), 'chunk is a power of two; got 12'),
    (dict(min_chunk=32, chunk=16), 'min_chunk is at most chunk=16'),
    (
      dict(cache_lens=(64,)),
      'cache_lens are increasing, from 1 or more to 1024',
    ),
    (dict(batch_sizes=(4, 2, 8)), 'batch_sizes are increasing'),
  ],
)
def test_sizes_that_cannot_be_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    EngineConfig(**options)


def test_sizes_are_made_of_the_largest():
  s = EngineConfig()
  assert s.batch_sizes == (1, 4, 8) and s.cache_lens == (256, 1024)
  assert s.chunks == (16, 64, 256)
  assert s.input_lens == (16, 32, 64, 128, 256, 512, 1024)
  s = EngineConfig(slots=6, max_model_len=100)
  assert s.batch_sizes == (1, 4, 6) and s.cache_lens == (100,)
  assert s.input_lens == (16, 32, 64, 100)
