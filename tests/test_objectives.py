# SPDX-License-Identifier: Apache-2.0
"""Objectives at known points, with a model that gives what it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.objectives import OBJECTIVES
from moepeft.objectives.seq2seq import (
  sequence_log_likelihood,
  shift_right,
  split_rngs,
)

from .contracts import small

B, T, V = 3, 5, 37
BATCH = small.batch()
every_objective = pytest.mark.parametrize('name', OBJECTIVES)
# Real target tokens: 5, 3 and 2 of the three rows' five.
REAL = 10
LOGITS = jax.random.normal(jax.random.key(0), (B, T, V))


def value(name, logits, batch=BATCH):
  """(loss, aux) where the model's logits are given."""

  def apply(variables, batch, train, rngs, mutable):
    del batch, train, rngs, mutable
    return variables, {}

  return OBJECTIVES[name](apply, logits, batch, None)


def permuted(batch, order):
  return {key: array[jnp.array(order)] for key, array in batch.items()}


@every_objective
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(name):
  loss, aux = value(name, jnp.full((B, T, V), 3.0))
  np.testing.assert_allclose(loss, np.log(V), rtol=1e-6)
  assert int(aux['tokens']) == REAL


@every_objective
def test_loss_is_the_mean_over_real_tokens(name):
  loss, aux = value(name, LOGITS)
  logits = np.asarray(LOGITS, np.float64)
  total = right = 0
  for b in range(B):
    for t in range(T):
      if BATCH['targets_mask'][b, t]:
        target = BATCH['targets'][b, t]
        total += np.log(np.sum(np.exp(logits[b, t]))) - logits[b, t, target]
        right += np.argmax(logits[b, t]) == target
  np.testing.assert_allclose(loss, total / REAL, rtol=1e-6)
  assert int(aux['correct']) == right


@every_objective
def test_correct_tokens_are_counted_where_they_are_real(name):
  sure = 9.0 * jax.nn.one_hot(BATCH['targets'], V)
  assert int(value(name, sure)[1]['correct']) == REAL
  # The first target of the first row is missed.
  wrong = sure.at[0, 0, (BATCH['targets'][0, 0] + 1) % V].set(99.0)
  assert int(value(name, wrong)[1]['correct']) == REAL - 1


@every_objective
def test_raising_a_real_target_lowers_the_loss(name):
  slope = jax.grad(lambda logits: value(name, logits)[0])(LOGITS)
  targets = jax.nn.one_hot(BATCH['targets'], V, dtype=bool)
  real = BATCH['targets_mask'][..., None]
  assert (slope[targets & real] < 0).all()
  assert (slope[~targets & real] > 0).all()
  # What is masked has no gradient at all.
  np.testing.assert_array_equal(jnp.where(real, 0, slope), 0)


@every_objective
def test_masked_targets_do_not_count(name):
  real = BATCH['targets_mask']
  other = BATCH | {'targets': jnp.where(real, BATCH['targets'], 7)}
  logits = jnp.where(real[..., None], LOGITS, 99.0)
  expected, aux = value(name, LOGITS)
  found, seen = value(name, logits, other)
  assert float(found) == float(expected)
  assert int(seen['correct']) == int(aux['correct'])


@every_objective
def test_order_of_the_batch_does_not_count(name):
  order = [2, 0, 1]
  expected, aux = value(name, LOGITS)
  found, seen = value(name, LOGITS[jnp.array(order)], permuted(BATCH, order))
  # Sums in another order.
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert int(seen['correct']) == int(aux['correct'])


@every_objective
def test_a_batch_without_a_real_token_costs_nothing(name):
  none = BATCH | {'targets_mask': jnp.zeros((B, T), bool)}
  loss, aux = value(name, LOGITS, none)
  assert float(loss) == 0 == int(aux['correct'])


@every_objective
def test_noise_is_on_where_there_are_rngs_only(name):
  seen = []

  def apply(variables, batch, train, rngs, mutable):
    del variables, batch
    seen.append((train, None if rngs is None else set(rngs)))
    return LOGITS, {'routing': mutable}

  rngs = split_rngs(jax.random.key(0))
  for given in (None, rngs):
    _, aux = OBJECTIVES[name](apply, {}, BATCH, given)
    assert aux['routing'] == ['routing']
  assert seen == [(False, None), (True, {'dropout', 'router'})]
  keys = [jax.random.key_data(key).tolist() for key in rngs.values()]
  assert keys[0] != keys[1]


def test_a_sequence_s_likelihood_is_the_sum_of_its_real_tokens():
  # Each real token is one of 37: rows of 5, 3 and 2.
  uniform = jnp.zeros((B, T, V))
  found = sequence_log_likelihood(
    uniform, BATCH['targets'], BATCH['targets_mask']
  )
  np.testing.assert_allclose(found, -np.log(V) * np.array([5, 3, 2]), rtol=1e-6)


def test_decoders_see_the_targets_one_place_later():
  targets = jnp.array([[[5, 7, 1], [2, 1, 0]]])
  np.testing.assert_array_equal(shift_right(targets), [[[0, 5, 7], [0, 2, 1]]])
