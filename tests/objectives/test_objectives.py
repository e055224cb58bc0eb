# SPDX-License-Identifier: Apache-2.0
"""Objectives at known points, with a model that gives what it is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.evaluation.rank_classification import shift_right
from moepeft.objectives import OBJECTIVES
from moepeft.objectives.cross_entropy import (
  CrossEntropySettings,
  mean_loss,
  sequence_log_likelihood,
)
from moepeft.training.step import split_rngs

from ..contracts import small

B, T, V = 3, 5, 37
BATCH = small.batch()
every_objective = pytest.mark.parametrize('name', ('seq2seq', 'causal'))
# Real target tokens: 5, 3 and 2 of the three rows' five.
REAL = 10
LOGITS = jax.random.normal(jax.random.key(0), (B, T, V))


def value(name, logits, batch=BATCH, **loss):
  """(mean loss, aux) where the model's logits are given."""

  return compiled_value(name, CrossEntropySettings(**loss))(logits, batch)


@functools.cache
def compiled_value(name, settings):
  def apply(variables, batch, train, rngs, mutable):
    del batch, train, rngs, mutable
    return variables, {}

  objective = OBJECTIVES[name].build(settings)

  @jax.jit
  def run(logits, batch):
    total, aux = objective(apply, logits, batch, None)
    return mean_loss(total, aux), aux

  return run


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
  changed_batch = BATCH | {'targets': jnp.where(real, BATCH['targets'], 7)}
  logits = jnp.where(real[..., None], LOGITS, 99.0)
  expected, aux = value(name, LOGITS)
  loss, changed_aux = value(name, logits, changed_batch)
  assert float(loss) == float(expected)
  assert int(changed_aux['correct']) == int(aux['correct'])


@every_objective
def test_order_of_the_batch_does_not_count(name):
  order = [2, 0, 1]
  expected, aux = value(name, LOGITS)
  loss, permuted_aux = value(
    name, LOGITS[jnp.array(order)], permuted(BATCH, order)
  )
  # Sums in another order.
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert int(permuted_aux['correct']) == int(aux['correct'])


@every_objective
def test_a_batch_without_a_real_token_costs_nothing(name):
  none = BATCH | {'targets_mask': jnp.zeros((B, T), bool)}
  for per in ('tokens', 'sequences'):
    loss, aux = value(name, LOGITS, none, average_over=per)
    assert float(loss) == 0 == int(aux['correct']) == int(aux['weight'])
    slope = jax.grad(
      lambda x, per=per: value(name, x, none, average_over=per)[0]
    )
    np.testing.assert_array_equal(slope(LOGITS), 0)


@every_objective
def test_noise_is_on_where_there_are_rngs_only(name):
  calls = []

  def apply(variables, batch, train, rngs, mutable):
    del variables, batch
    calls.append((train, None if rngs is None else set(rngs)))
    return LOGITS, {'routing': mutable}

  rngs = split_rngs(jax.random.key(0))
  for call_rngs in (None, rngs):
    _, aux = OBJECTIVES[name].loss_fn(apply, {}, BATCH, call_rngs)
    assert aux['routing'] == ['routing']
  assert calls == [(False, None), (True, {'dropout', 'router'})]
  keys = [jax.random.key_data(key).tolist() for key in rngs.values()]
  assert keys[0] != keys[1]


def halves(costs):
  """Logits [b, t, 2] whose target 0 has probability 2^-cost."""
  p = 0.5 ** jnp.asarray(costs, jnp.float32)
  return jnp.log(jnp.stack([p, 1 - p], axis=-1))


# A row of two examples, then one of a single token and padding, in halvings:
# the examples' means are (1 + 2 + 6) / 3 = 3, (2 + 3) / 2 = 2.5 and 7.
COSTS = [[1, 2, 6, 2, 3], [7, 9, 9, 9, 9]]
SEGMENTS = jnp.array([[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]])
PACKED = {
  'targets': jnp.zeros((2, 5), jnp.int32),
  'targets_mask': SEGMENTS > 0,
  'targets_segments': SEGMENTS,
}


@every_objective
def test_loss_per_sequence_is_a_mean_of_examples_means(name):
  loss, aux = value(name, halves(COSTS), PACKED, average_over='sequences')
  assert int(aux['weight']) == 3
  np.testing.assert_allclose(loss, (3 + 2.5 + 7) / 3 * np.log(2), rtol=1e-6)
  # Per token, it is a mean of six.
  loss, aux = value(name, halves(COSTS), PACKED)
  assert int(aux['weight']) == 6 == int(aux['tokens'])
  np.testing.assert_allclose(loss, 21 / 6 * np.log(2), rtol=1e-6)


@every_objective
def test_without_segments_a_row_is_an_example(name):
  # Rows 1 + 2 + 6 + 2 + 3 over five and 7 over one; a filling row is none.
  rows = {key: PACKED[key] for key in ('targets', 'targets_mask')}
  filled = {key: jnp.pad(a, ((0, 1), (0, 0))) for key, a in rows.items()}
  expected = (14 / 5 + 7) / 2 * np.log(2)
  for batch, costs in ((rows, COSTS), (filled, [*COSTS, [9] * 5])):
    loss, aux = value(name, halves(costs), batch, average_over='sequences')
    assert int(aux['weight']) == 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@every_objective
def test_an_example_without_a_real_target_is_none(name):
  # The second segment's targets are masked, as a prompt's would be.
  masked = PACKED | {'targets_mask': SEGMENTS == 1}
  loss, aux = value(name, halves(COSTS), masked, average_over='sequences')
  assert int(aux['weight']) == 2
  np.testing.assert_allclose(loss, (3 + 7) / 2 * np.log(2), rtol=1e-6)


@every_objective
def test_z_loss_adds_the_squared_log_partition_of_real_tokens(name):
  # Logits c for each of 37: log-partition c + ln 37, whatever the target.
  loss, aux = value(name, jnp.full((B, T, V), 3.0), z_loss=0.01)
  expected = np.log(V) + 0.01 * (3 + np.log(V)) ** 2
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  # What is logged beside it has no such term.
  np.testing.assert_allclose(aux['nll'] / REAL, np.log(V), rtol=1e-6)


@every_objective
def test_smoothed_labels_are_cheapest_at_their_own_distribution(name):
  # 0.9 at the target and 0.1 / 36 elsewhere costs nothing, and is the least.
  target = jax.nn.one_hot(BATCH['targets'], V)
  best = jnp.log(jnp.where(target > 0, 0.9, 0.1 / (V - 1)))
  loss, slope = jax.value_and_grad(
    lambda x: value(name, x, label_smoothing=0.1)[0]
  )(best)
  # Of a sum of 37 numbers near ln 360 = 6 in float32.
  np.testing.assert_allclose(loss, 0, atol=2e-6)
  np.testing.assert_allclose(slope, 0, atol=1e-7)
  for logits in (0.5 * best, 2 * best, LOGITS):
    assert float(value(name, logits, label_smoothing=0.1)[0]) > 0.1


@every_objective
def test_smoothed_labels_cost_what_their_definition_says(name):
  # Cross-entropy with the whole smoothed distribution, less its own entropy.
  s, z = 0.2, 0.01
  loss, aux = value(name, LOGITS, label_smoothing=s, z_loss=z)
  logits = np.asarray(LOGITS, np.float64)
  log_z = np.log(np.sum(np.exp(logits), axis=-1))
  soft = np.full((B, T, V), s / (V - 1))
  np.put_along_axis(soft, np.asarray(BATCH['targets'])[..., None], 1 - s, -1)
  costs = np.sum(soft * (np.log(soft) - logits + log_z[..., None]), axis=-1)
  costs = (costs + z * log_z**2)[np.asarray(BATCH['targets_mask'])]
  np.testing.assert_allclose(loss, np.mean(costs), rtol=1e-6)
  plain = value(name, LOGITS)[0]
  np.testing.assert_allclose(aux['nll'] / REAL, plain, rtol=1e-6)


@every_objective
def test_losses_are_float32_of_bfloat16_logits(name):
  narrow = LOGITS.astype(jnp.bfloat16)
  settings = dict(z_loss=0.01, label_smoothing=0.1)
  loss, _ = value(name, narrow, **settings)
  expected, _ = value(name, narrow.astype(jnp.float32), **settings)
  assert loss.dtype == jnp.float32
  assert float(loss) == float(expected)


def two_passes(rngs):
  """(loss, its slope at LOGITS); the second pass has twice the logits."""

  def loss(first):
    passes = iter((first, 2 * LOGITS))

    def apply(variables, batch, train, rngs, mutable):
      keys.append(rngs)
      return next(passes), {}

    objective = OBJECTIVES['seq2seq'].build(
      CrossEntropySettings(consistency=3.0)
    )
    return mean_loss(*objective(apply, {}, BATCH, rngs))

  keys = []
  return jax.value_and_grad(loss)(LOGITS), keys


def test_consistency_is_the_symmetric_divergence_of_two_passes():
  # AdaMix, arXiv:2205.12410, equation 6, over the real targets.
  logits = np.asarray(LOGITS, np.float64)
  p, q = (
    np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (logits, 2 * logits)
  )
  divergence = 0.5 * ((p - q) * (np.log(p) - np.log(q))).sum(-1)
  mask = np.asarray(BATCH['targets_mask'])
  plain = float(value('seq2seq', LOGITS)[0])
  (loss, slope), keys = two_passes({'router': jax.random.key(3)})
  np.testing.assert_allclose(
    loss, plain + 3 * divergence[mask].mean(), rtol=1e-5
  )
  # The gradient stops at the first distribution, which leaves that of
  # KL(q, p), p - q, to the logits of p.
  one_hot = np.eye(V)[np.asarray(BATCH['targets'])]
  expected = (p - one_hot + 3 * 0.5 * (p - q)) * mask[..., None] / REAL
  np.testing.assert_allclose(slope, expected, atol=1e-6)
  assert keys[0]['router'] != keys[1]['router']


def test_consistency_is_a_loss_of_training_alone():
  (loss, _), keys = two_passes(None)
  np.testing.assert_allclose(loss, value('seq2seq', LOGITS)[0], rtol=1e-6)
  assert keys == [None]


def test_a_loss_is_per_tokens_or_per_sequences():
  with pytest.raises(ValueError, match="got 'examples'"):
    CrossEntropySettings(average_over='examples')


def test_a_sequence_s_likelihood_is_the_sum_of_its_real_tokens():
  # Each real token is one of 37: rows of 5, 3 and 2.
  uniform = jnp.zeros((B, T, V))
  log_likelihood = sequence_log_likelihood(
    uniform, BATCH['targets'], BATCH['targets_mask']
  )
  np.testing.assert_allclose(
    log_likelihood, -np.log(V) * np.array([5, 3, 2]), rtol=1e-6
  )


def test_decoders_see_the_targets_one_place_later():
  targets = jnp.array([[[5, 7, 1], [2, 1, 0]]])
  np.testing.assert_array_equal(shift_right(targets), [[[0, 5, 7], [0, 2, 1]]])
