# SPDX-License-Identifier: Apache-2.0
"""An engine without a thread of its own: batches of answers, log-probabilities
and new weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.evaluation.loglikelihood import losses
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import (
  LENGTH,
  Finished,
  LogprobRequest,
  Request,
  RequestRefused,
  Token,
)
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig

from ...contracts import answers, small
from .. import engines
from ..engines import prompt

CONFIG = EngineConfig(
  slots=3,
  max_model_len=engines.LENGTH,
  queue=2,
  chunk=8,
  min_chunk=8,
  cache_lens=(engines.LENGTH,),
  batch_sizes=(3,),
  prefill_batch_sizes=(1, 3),
  compile_ahead=False,
)
T5 = "molora(experts=3, rank=2, targets='*/q|*/wo')"


def decoder(adapter='one', **changes):
  """A new engine of the small decoder with one of its adapters as its own."""
  model, params, contents = engines.decoder()
  config = dataclasses.replace(CONFIG, **changes)
  return Engine(model, params, FixedAdapter(model, contents[adapter]), config)


@pytest.fixture(scope='module')
def engine():
  """An engine with adapter 'one', for tests that leave it so."""
  return decoder()


@pytest.fixture(scope='module')
def t5_engine():
  """An engine of a small T5 with an adapter as its own."""
  model, _ = small.make(T5)
  variables = small.variables(T5, noise=0.1)
  config = dataclasses.replace(CONFIG, max_model_len=16, cache_lens=(16,))
  pool = FixedAdapter(model, variables['peft'])
  return Engine(model, variables['params'], pool, config)


def requests(sizes, new=6, **options):
  return [
    Request(f'r{i}', prompt(i, size), new, **options)
    for i, size in enumerate(sizes)
  ]


def plain(ids, adapter, new=6, params=None):
  """Greedy tokens by whole calls without a cache.

  Args:
    params: of the base; None takes the shared decoder's.
  """
  model, shared, contents = engines.decoder()
  variables = {'params': params or shared, 'peft': contents[adapter]}
  answer = []
  for _ in range(new):
    whole = engines.logprobs([*ids, *answer], model, variables)
    answer.append(int(np.argmax(whole[-1])))
  return answer


@pytest.mark.parametrize('scan', [False, True])
def test_a_batch_of_answers_is_that_of_whole_calls(scan):
  # More than slots and queue hold; prompts of one token and of several chunks.
  asked = requests((5, 1, 20, 9, 8, 3, 11))
  completions = decoder(scan=scan).generate(asked)
  for request, completion in zip(asked, completions, strict=True):
    assert completion.ids == plain(request.prompt_ids, 'one')
    assert completion.finished.reason == LENGTH


def test_no_end_is_chosen_before_the_least_tokens(engine):
  (request,) = requests((7,))
  (free,) = engine.generate([request])
  ends = tuple(free.ids[:2])
  stopped = dataclasses.replace(request, eos_token_ids=ends)
  assert engine.generate([stopped])[0].ids == free.ids[:1]
  later = dataclasses.replace(stopped, min_new_tokens=4)
  (answer,) = engine.generate([later])
  assert len(answer.ids) >= 4 and not {*answer.ids[:4]} & {*ends}


def test_a_stream_that_is_closed_leaves_the_engine_idle(engine):
  stream = engine.stream(requests((4, 5, 6, 7), new=20))
  assert isinstance(next(stream)[1], Token)
  stream.close()
  stats = engine.stats()
  assert stats.running == stats.waiting == 0 and stats.finished['cancelled']
  (answer,) = engine.generate(requests((4,)))
  assert answer.ids == plain(prompt(0, 4), 'one')


@pytest.mark.parametrize('first', [False, True])
def test_a_decode_step_may_wait_for_the_prompts_of_all_slots(first):
  engine = decoder(prefill_batch_sizes=(1,), prefill_first=first)
  rows = [
    request.id
    for request, event in engine.stream(requests((5, 9, 3)))
    if isinstance(event, Token)
  ]
  together = ['r0', 'r1', 'r2']
  # Otherwise the first two answers begin before the third prompt is read.
  assert rows == (
    together * 6
    if first
    else ['r0', 'r0', 'r1', *together * 4, 'r1', 'r2', 'r2']
  )


def test_programs_are_compiled_once_and_only_those_that_are_needed():
  engine = decoder()
  engine.generate(requests((5, 6)))
  compiled = engine.stats().compiled
  # Prefill and decode: before the layers, a layer, and after them.
  assert compiled == 6
  engine.generate(requests((7, 3, 8)))
  assert engine.stats().compiled == compiled


def test_a_request_that_does_not_fit_is_refused(engine):
  with pytest.raises(RequestRefused, match='shorten the prompt'):
    engine.generate(requests((engines.LENGTH,)))


def score_decoder(variables, model, request):
  """Log-probabilities as training computes them."""
  ids = np.zeros(engines.LENGTH + 1, np.int32)
  text = [*request.prompt_ids, *request.answer_ids]
  ids[: len(text)] = text
  at = np.arange(1, len(ids))
  mask = (len(request.prompt_ids) <= at) & (at < len(text))
  # No token sees the padding behind it.
  batch = {'inputs': ids[:-1], 'targets': ids[1:], 'targets_mask': mask}
  batch = {key: jnp.array(value)[None] for key, value in batch.items()}
  nll = compiled_losses(model, variables, batch)[0]
  return -np.asarray(nll)[mask]


compiled_losses = jax.jit(losses, static_argnums=0)


def test_log_probs_of_a_decoder_are_those_of_training(engine):
  model, params, contents = engines.decoder()
  asked = [
    LogprobRequest(prompt(i, size), prompt(10 + i, answer))
    for i, (size, answer) in enumerate(((4, 5), (17, 1), (1, 9), (3, 20)))
  ]
  variables = {'params': params, 'peft': contents['one']}
  scores = engine.log_probs(asked)
  for request, score in zip(asked, scores, strict=True):
    expected = score_decoder(variables, model, request)
    assert score.shape == expected.shape
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-5)


def test_log_probs_of_an_encoder_decoder_are_those_of_training(t5_engine):
  model, _ = small.make(T5)
  variables = small.variables(T5, noise=0.1)
  # Inputs shorter and longer than the answer, of two encoded lengths.
  for size, answer in ((3, 5), (11, 2)):
    ids = tuple(int(i) % 30 + 2 for i in prompt(size, size))
    targets = tuple(int(i) % 30 + 2 for i in prompt(answer, answer))
    batch = {
      'inputs': jnp.array([ids]),
      'decoder_inputs': jnp.array([(0, *targets[:-1])]),
      'targets': jnp.array([targets]),
      'targets_mask': jnp.ones((1, answer), bool),
    }
    (score,) = t5_engine.log_probs([LogprobRequest(ids, targets)])
    expected = -compiled_losses(model, variables, batch)[0]
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-5)


def test_new_weights_answer_and_nothing_of_the_old_ones(engine):
  _, params, contents = engines.decoder()
  asked = requests((18, 5))
  old = [completion.ids for completion in engine.generate(asked)]
  new_params = engines.moved(params, 7)
  variables = {'params': new_params, 'peft': contents['two']}
  engine.update_weights(variables)
  completions = engine.generate(asked)
  for request, completion in zip(asked, completions, strict=True):
    ids = request.prompt_ids
    assert completion.ids == plain(ids, 'two', params=new_params)
    # The old weights' keys and values are not reused.
    assert completion.finished.cached == 0
  assert [completion.ids for completion in completions] != old
  # The adapter alone.
  engine.update_weights({'peft': contents['one']})
  engine.update_weights({'params': params})
  assert [completion.ids for completion in engine.generate(asked)] == old


def test_new_weights_of_an_encoder_decoder_forget_encoded_inputs(t5_engine):
  model, _ = small.make(T5)
  before, after = (small.variables(T5, noise=noise) for noise in (0.1, 0.5))
  asked = [Request('a', (5, 6, 7), 6, logprobs=0)]
  (old,) = t5_engine.generate(asked)
  t5_engine.update_weights(after)
  (new,) = t5_engine.generate(asked)
  t5_engine.update_weights(before)
  assert new.finished.cached == 0
  logits = answers.uncached_logits(model, after, (5, 6, 7), new.ids)[:-1]
  rows = np.asarray(jax.nn.log_softmax(logits))
  assert new.ids == rows.argmax(-1).tolist()
  logprobs = [token.logprob for token in new.tokens]
  np.testing.assert_allclose(logprobs, rows.max(-1), rtol=1e-4, atol=1e-5)
  assert old.tokens != new.tokens


def test_weights_of_another_shape_are_refused(engine):
  _, params, _ = engines.decoder()
  wider = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=-1), params)
  with pytest.raises(ValueError, match='in names, shapes or dtypes'):
    engine.update_weights({'params': wider})
  with pytest.raises(ValueError, match="the collections 'params' and 'peft'"):
    engine.update_weights({'cache': {}})
  stream = engine.stream(requests((4,), new=9))
  next(stream)
  with pytest.raises(ValueError, match='requests are running'):
    engine.update_weights({'params': params})
  assert isinstance(list(stream)[-1][1], Finished)


def test_new_weights_wait_for_running_requests():
  model, params, contents = engines.decoder()
  pool = FixedAdapter(model, contents['one'])
  config = dataclasses.replace(CONFIG, prefill_batch_sizes=(1,))
  with engines.running(model, params, pool, config) as engine:
    (request,) = requests((4,), new=30)
    answer = engines.Answer()
    engine.submit(request, answer.deliver)
    engine.update_weights({'peft': contents['two']})
    assert answer.tokens == plain(request.prompt_ids, 'one', 30)
    (after,) = engine.generate(requests((4,)))
    assert after.ids == plain(prompt(0, 4), 'two')
