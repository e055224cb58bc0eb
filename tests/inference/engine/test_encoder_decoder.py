# SPDX-License-Identifier: Apache-2.0
"""An encoder-decoder through the same scheduler."""

import functools

import jax
import numpy as np
import pytest

from moepeft.inference.api import LENGTH, PromptTooLong, RequestRefused
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.sampling import Sampling
from moepeft.models.t5.model import T5

from ...contracts import answers, small
from ..engines import METHOD, Stacked, ask, moved, prompt, running

# Of the largest log-probability, some 7: float32 sums in another order.
CLOSE = 1e-5
SIZES = (11, 1, 5, 17, 2)
PLACES = 17


@functools.cache
def contents():
  clean = small.variables(METHOD)['peft']
  return {'': clean, 'one': moved(clean, 1)}


@pytest.fixture(scope='module')
def engine():
  model, _ = small.make(METHOD)
  banks = Stacked(model.adapter_map, contents(), {'one': 'one'})
  settings = EngineConfig(
    slots=3,
    max_model_len=PLACES,
    min_chunk=8,
    chunk=8,
    cache_lens=(8, PLACES),
    batch_sizes=(3,),
    routing=True,
    # Of two short ones or so: 11 numbers of 4 bytes for each of 8 places.
    encoder_bytes=800,
  )
  with running(model, small.params(), banks, settings) as actual:
    yield actual


@functools.cache
def whole():
  """A call of the model: log-probabilities [t, v]."""
  model, _ = small.make(METHOD)
  return jax.jit(
    lambda peft, batch: jax.nn.log_softmax(
      model.apply({'params': small.params(), 'peft': peft}, batch)[0]
    )
  )


def expected(ids, answer, adapter):
  """log-probabilities [t, v] of each token of an answer, by one call."""
  inputs, before = np.zeros((2, 1, PLACES), np.int32)
  inputs[0, : len(ids)], before[0, 1 : len(answer)] = ids, answer[:-1]
  batch = {
    'inputs': inputs,
    'inputs_mask': np.arange(PLACES)[None] < len(ids),
    'decoder_inputs': before,
  }
  return np.asarray(whole()(contents()[adapter], batch)[: len(answer)])


@pytest.mark.parametrize('adapter', ['', 'one'])
def test_answers_are_the_models(engine, adapter):
  asked = [
    (ids, ask(engine, ids, 9, adapter=adapter, logprobs=2))
    for ids in (prompt(i, size) for i, size in enumerate(SIZES))
  ]
  for ids, answer in asked:
    rows = expected(ids, answer.tokens, adapter)
    close = CLOSE * np.abs(rows).max()
    assert answer.tokens == rows.argmax(-1).tolist()
    for row, token in zip(rows, answer.scored, strict=True):
      assert abs(token.logprob - row[token.id]) < close
      best = np.sort(row)[::-1][:2]
      np.testing.assert_allclose([p for _, p in token.top], best, atol=close)


@pytest.mark.parametrize('penalty', [None, 1.7])
def test_greedy_answers_are_those_of_whole_calls(engine, penalty):
  # The decoder's first padding token counts as repeated, the inputs do not.
  ids = prompt(30, 6)
  sampling = Sampling(repetition_penalty=penalty)
  answer = ask(engine, ids, PLACES, sampling=sampling)
  variables = {'params': small.params()}
  assert answer.tokens == answers.uncached_greedy(
    T5(small.GATED), variables, ids, PLACES, penalty or 1.0
  )


def test_inputs_asked_again_are_not_encoded_again(engine):
  ids = prompt(31, 7)
  first = ask(engine, ids, 4, adapter='one')
  assert first.end.cached == 0
  again = ask(engine, ids, 4, adapter='one')
  assert again.end.cached == 7 and again.tokens == first.tokens
  # By the adapter's content, not by the inputs alone.
  assert ask(engine, ids, 4).end.cached == 0
  # Those used longest ago make room.
  for i in range(3):
    ask(engine, prompt(40 + i, 8), 1).wait()
  assert ask(engine, ids, 4, adapter='one').end.cached == 0


def test_an_answer_is_the_same_in_any_company(engine):
  def submit(i):
    s = Sampling(temperature=1.0) if i % 2 else Sampling()
    ids = prompt(50 + i, SIZES[i % 5])
    adapter = ('', 'one')[i % 2]
    return ask(engine, ids, 3 + i, adapter=adapter, sampling=s, seed=i)

  alone = [submit(i).wait() for i in range(6)]
  together = {i: submit(i) for i in reversed(range(6))}
  for i, answer in enumerate(alone):
    assert answer.tokens == together[i].tokens


def test_experts_are_told(engine):
  answer = ask(engine, prompt(61, 6), 2, adapter='one', routing=True)
  for token in answer.scored:
    assert abs(sum(token.experts['decoder/self/q']) - 1) < CLOSE
    assert not any(site.startswith('encoder') for site in token.experts)


def test_what_does_not_fit_is_refused(engine):
  with pytest.raises(RequestRefused, match='log-probabilities of its prompt'):
    ask(engine, (3, 4), prompt_logprobs=1)
  with pytest.raises(PromptTooLong, match=f'takes {PLACES} for each'):
    ask(engine, (3,) * (PLACES + 1), 1)
  # Inputs and answer have places of their own.
  assert ask(engine, (3,) * PLACES, PLACES).end.reason == LENGTH
