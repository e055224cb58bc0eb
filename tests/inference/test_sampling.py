# SPDX-License-Identifier: Apache-2.0
"""Each filter is its formula and that of `transformers`; draws are a row's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.inference import sampling
from moepeft.inference.engine import sampler
from moepeft.inference.sampling import Sampling

# Probabilities 1/2, 1/4, 1/8, 1/8 at places 2, 0, 3, 1; the last two equal.
LOGITS = jnp.log(jnp.array([[0.25, 0.125, 0.5, 0.125]]))


def kept(logits):
  return np.isfinite(np.asarray(logits)).astype(int).tolist()


# Compiled once for all numbers.
top_k, top_p, min_p = map(
  jax.jit, (sampling.top_k, sampling.top_p, sampling.min_p)
)


def drawer(sampling_config):
  """(logits, seeds) -> ids, compiled."""

  @jax.jit
  def draw(logits, seeds):
    keys = jax.vmap(jax.random.key)(seeds)
    return sampling.sample_tokens(logits, sampling_config, keys)

  return draw


def test_top_k_keeps_the_greatest_and_their_equals():
  assert kept(top_k(LOGITS, 1)) == [[0, 0, 1, 0]]
  assert kept(top_k(LOGITS, 2)) == [[1, 0, 1, 0]]
  assert kept(top_k(LOGITS, 3)) == [[1, 1, 1, 1]]
  assert kept(top_k(LOGITS, 99)) == [[1, 1, 1, 1]]


def test_top_p_keeps_the_fewest_that_reach_it():
  # 0.5 reaches 0.4; 0.5 + 0.25 reaches 0.6; then one of two equals, the one
  # of the greater id, reaches 0.8.
  assert kept(top_p(LOGITS, 0.4)) == [[0, 0, 1, 0]]
  assert kept(top_p(LOGITS, 0.6)) == [[1, 0, 1, 0]]
  assert kept(top_p(LOGITS, 0.8)) == [[1, 0, 1, 1]]
  assert kept(top_p(LOGITS, 1.0)) == [[1, 1, 1, 1]]
  assert kept(top_p(LOGITS, 1e-6)) == [[0, 0, 1, 0]]


def test_min_p_keeps_a_share_of_the_most_probable():
  # 0.25 is half of 0.5, 0.125 a quarter.
  assert kept(min_p(LOGITS, 0.3)) == [[1, 0, 1, 0]]
  assert kept(min_p(LOGITS, 0.2)) == [[1, 1, 1, 1]]
  assert kept(min_p(LOGITS, 1.0)) == [[0, 0, 1, 0]]


def test_a_penalty_makes_what_was_there_less_likely():
  logits = jnp.array([[2.0, -3.0, 5.0, 0.0]])
  seen = jnp.array([[True, True, False, True]])
  # 2 / 2, -3 * 2, 5 as it was, 0 stays.
  actual = sampling.apply_repetition_penalty(logits, seen, 2.0)
  np.testing.assert_array_equal(actual, [[1, -6, 5, 0]])


def test_count_penalties_are_those_of_the_definition():
  # logit - count * frequency - (count > 0) * presence, OpenAI's and vLLM's.
  rng = np.random.default_rng(0)
  # Multiples of 1/8 and 1/4: products and differences are exact.
  logits = rng.integers(-40, 40, (5, 31)).astype(np.float32) / 8
  counts = rng.integers(0, 4, (5, 31)).astype(np.float32)
  frequency, presence = np.float32([0.5, -1.25, 2, 0, 1]), np.float32(0.75)
  actual = jax.jit(sampling.apply_count_penalties)(
    logits, counts, frequency, presence
  )
  expected = logits.copy()
  for row in range(5):
    for token in range(31):
      expected[row, token] -= counts[row, token] * frequency[row]
      expected[row, token] -= presence if counts[row, token] else 0
  np.testing.assert_array_equal(actual, expected)


def test_rows_may_have_numbers_of_their_own():
  logits = jnp.tile(LOGITS, (3, 1))
  assert kept(top_k(logits, jnp.array([1, 2, 4]))) == [
    [0, 0, 1, 0],
    [1, 0, 1, 0],
    [1, 1, 1, 1],
  ]
  assert kept(top_p(logits, jnp.array([0.4, 0.6, 1.0]))) == [
    [0, 0, 1, 0],
    [1, 0, 1, 0],
    [1, 1, 1, 1],
  ]
  # Rows at 0 are greedy beside one that is drawn.
  s = Sampling(temperature=jnp.array([0.0, 0.0, 50.0]))
  seeds = np.arange(99)
  draw = drawer(s)
  drawn = [draw(logits, seeds[i : i + 3]) for i in range(9)]
  assert {int(row[0]) for row in drawn} == {2}
  assert len({int(row[2]) for row in drawn}) > 1


def test_draws_follow_the_filtered_probabilities():
  n = 4000
  seeds = np.arange(n)
  s = Sampling(temperature=2.0, top_k=2)
  drawn = drawer(s)(jnp.tile(LOGITS, (n, 1)), seeds)
  counts = np.bincount(drawn, minlength=4) / n
  # At temperature 2 they go as square roots: sqrt(1/2) : sqrt(1/4).
  share = 2**0.5 / (1 + 2**0.5)
  # Four standard deviations of a share of 4000 draws are 0.031.
  np.testing.assert_allclose(counts, [1 - share, 0, share, 0], atol=0.031)


def test_a_draw_is_its_rows_own():
  logits = np.random.default_rng(0).standard_normal((7, 53), np.float32)
  seeds = np.arange(7)
  s = Sampling(temperature=1.3, top_p=0.9, min_p=0.01)
  draw = drawer(s)
  together = draw(logits, seeds)
  alone = [draw(logits[i : i + 1], seeds[i : i + 1])[0] for i in range(7)]
  assert together.tolist() == [int(token) for token in alone]
  assert len(set(together.tolist())) > 1


@pytest.mark.parametrize(
  'values, message',
  [
    ({'temperature': -1.0}, 'temperature is at least 0'),
    ({'temperature': 1.0, 'top_p': 1.5}, 'top_p is above 0 and at most 1'),
    ({'temperature': 1.0, 'top_p': 0.0}, 'top_p is above 0'),
    ({'temperature': 1.0, 'top_k': 0}, 'top_k is at least 1; got 0'),
    ({'temperature': 1.0, 'min_p': 2.0}, 'min_p is at least 0 and at most 1'),
    ({'repetition_penalty': 0.0}, 'repetition_penalty is above 0'),
    ({'frequency_penalty': 2.5}, 'frequency_penalty is from -2 to 2; got 2.5'),
    ({'presence_penalty': float('nan')}, 'presence_penalty is from -2 to 2'),
    ({'logit_bias': ((7, 101.0),)}, 'logit_bias is from -100 to 100; got 101'),
    ({'logit_bias': ((-1, 1.0),)}, 'a token of logit_bias is at least 0'),
    ({'top_k': 3}, 'top_k has no effect without a temperature'),
    ({'temperature': 0.0, 'min_p': 0.1}, 'min_p has no effect without'),
  ],
)
def test_numbers_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    sampling.check(Sampling(**values))


def test_a_bias_of_a_token_beyond_the_vocabulary_is_refused():
  sampling.check(Sampling(logit_bias=((30, -100),)), vocab=31)
  with pytest.raises(ValueError, match='from 0 to 30; got 31'):
    sampling.check(Sampling(logit_bias=((31, 1),)), vocab=31)


def test_filters_equal_those_of_transformers():
  torch = pytest.importorskip('torch')
  process = pytest.importorskip('transformers.generation.logits_process')
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(5, 101)) * 3).astype(np.float32)
  ids = rng.integers(0, 101, (5, 17))
  seen = np.zeros(logits.shape, bool)
  np.put_along_axis(seen, ids, True, axis=1)
  bias = np.zeros(101, np.float32)
  bias[[7, 90]] = 1.5, -100
  pairs = [
    (
      process.TemperatureLogitsWarper(0.7),
      lambda x: sampling.apply_temperature(x, 0.7),
    ),
    (process.TopKLogitsWarper(7), lambda x: sampling.top_k(x, 7)),
    (process.TopPLogitsWarper(0.83), lambda x: sampling.top_p(x, 0.83)),
    (process.TopPLogitsWarper(0.1), lambda x: sampling.top_p(x, 0.1)),
    (process.MinPLogitsWarper(0.07), lambda x: sampling.min_p(x, 0.07)),
    (
      process.RepetitionPenaltyLogitsProcessor(1.7),
      lambda x: sampling.apply_repetition_penalty(x, seen, 1.7),
    ),
    (
      process.SequenceBiasLogitsProcessor([[[7], 1.5], [[90], -100.0]]),
      lambda x: sampler.add_bias(x, bias),
    ),
  ]
  for reference, actual in pairs:
    expected = reference(torch.tensor(ids), torch.tensor(logits)).numpy()
    # One division or product each.
    np.testing.assert_allclose(jax.jit(actual)(logits), expected, rtol=1e-6)


@pytest.mark.parametrize(
  'values',
  [
    dict(temperature=0.7, top_k=31, top_p=0.83, min_p=0.07),
    dict(temperature=2.0, top_k=90, top_p=0.6, repetition_penalty=1.7),
    dict(temperature=0.3, min_p=0.02, repetition_penalty=0.8),
    dict(temperature=1.5, top_p=0.99, min_p=0.1),
  ],
  ids=str,
)
def test_filters_stand_in_the_order_of_transformers(values):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  # It has the list made: a model is asked, and no weight of it.
  with torch.device('meta'):
    model = transformers.GPT2LMHeadModel(
      transformers.GPT2Config(vocab_size=101, n_embd=8, n_layer=1, n_head=1)
    )
  unset = dict(top_k=0) | values
  config = transformers.GenerationConfig(do_sample=True, **unset)
  chain = model._get_logits_processor(config, 17)
  assert len(chain) == len(values)
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(13, 101)) * 3).astype(np.float32)
  ids = rng.integers(0, 101, (13, 17))
  seen = np.zeros(logits.shape, bool)
  np.put_along_axis(seen, ids, True, axis=1)
  expected = chain(torch.tensor(ids), torch.tensor(logits)).numpy()

  @jax.jit
  def filtered(candidate):
    if 'repetition_penalty' in values:
      candidate = sampling.apply_repetition_penalty(
        candidate, seen, values['repetition_penalty']
      )
    return sampling.filter_logits(candidate, Sampling(**values))

  actual = filtered(logits)
  # A division and a product each.
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  # Of each row something is left and something taken out.
  left = np.isfinite(expected).sum(axis=1)
  assert (left >= 1).all() and (left < 101).all()
