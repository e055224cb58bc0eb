# SPDX-License-Identifier: Apache-2.0
"""Preference losses at points derived by hand, and by another derivation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.objectives import (
  OBJECTIVES,
  check_config,
  dpo,
  kto,
  orpo,
  reward,
  simpo,
)

RNG = np.random.default_rng(0)
# Log-likelihoods of seven pairs, of policy and of reference, and lengths.
PI_W, PI_L, REF_W, REF_L = -30 * RNG.random((4, 7))
LENGTH_W, LENGTH_L = RNG.integers(2, 13, (2, 7))
H = (PI_W - REF_W) - (PI_L - REF_L)
LN2 = math.log(2)


def sigma(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def close(actual, expected):
  # float32 of numbers up to 60.
  np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


def test_without_a_margin_every_pairwise_loss_is_what_chance_costs():
  zero = jnp.zeros(3)
  close(dpo.sigmoid_loss(zero), LN2)
  close(dpo.sigmoid_loss(zero, label_smoothing=0.3), LN2)
  # ((1 - s) ln 2 - s ln 2) / (1 - 2 s).
  close(dpo.robust_loss(zero, label_smoothing=0.3), LN2)
  close(dpo.hinge_loss(zero), 1)
  # (0 - 1 / 0.2)^2.
  close(dpo.ipo_loss(zero, 0.1), 25)
  close(reward.bradley_terry_loss(zero, zero), LN2)
  # -log sigma(-2 * 0.5) = ln(1 + e).
  close(simpo.simpo_loss(zero, zero, 2, 0.5), math.log(1 + math.e))


def test_losses_at_odds_of_three_to_one():
  # beta h = ln 3, so sigma is 3/4 and 1 - sigma 1/4.
  h, beta = jnp.array([math.log(3) / 0.2]), 0.2
  right, wrong = math.log(4 / 3), math.log(4)
  close(dpo.sigmoid_loss(h, beta), right)
  close(dpo.sigmoid_loss(h, beta, 0.25), 0.75 * right + 0.25 * wrong)
  close(dpo.robust_loss(h, beta, 0.25), 1.5 * right - 0.5 * wrong)
  close(dpo.hinge_loss(h, beta), 0)  # 1 - 1.0986 is below zero
  close(dpo.hinge_loss(-h, beta), 1 + math.log(3))
  close(reward.bradley_terry_loss(h * beta, jnp.zeros(1)), right)
  # The same odds, as the chosen leads by the margin and ln 3 / beta.
  close(simpo.simpo_loss(h + 0.7, jnp.zeros(1), beta, 0.7), right)


def test_sigmoid_losses_agree_with_logits_of_policy_less_reference():
  # TRL's way: the policy's log-ratio of the pair less the reference's.
  logits = (PI_W - PI_L) - (REF_W - REF_L)
  for s in (0.0, 0.1):
    right, wrong = -np.log(sigma(0.3 * logits)), -np.log(sigma(-0.3 * logits))
    close(dpo.sigmoid_loss(H, 0.3, s), (1 - s) * right + s * wrong)
    expected = ((1 - s) * right - s * wrong) / (1 - 2 * s)
    close(dpo.robust_loss(H, 0.3, s), expected)
  close(dpo.hinge_loss(H, 0.3), np.maximum(0, 1 - 0.3 * logits))


def test_ipo_squares_what_per_token_means_lack_to_the_target():
  h = (PI_W / LENGTH_W - REF_W / LENGTH_W) - (PI_L - REF_L) / LENGTH_L
  expected = h**2 - h / 0.3 + 1 / (4 * 0.3**2)
  close(dpo.ipo_loss(jnp.asarray(h), 0.3), expected)


def test_orpo_is_likelihood_and_the_log_of_an_odds_ratio():
  w, r = PI_W / LENGTH_W, PI_L / LENGTH_L
  p, q = np.exp(w), np.exp(r)
  odds_ratio = (p / (1 - p)) / (q / (1 - q))
  # log sigma(log o) = log(o / (1 + o)).
  expected = -w - 0.3 * np.log(odds_ratio / (1 + odds_ratio))
  close(orpo.orpo_loss(jnp.asarray(w), jnp.asarray(r), 0.3), expected)
  # p = 1/2 has odds 1, p = 1/4 odds 1/3: log sigma(ln 3) = ln(3/4).
  half, quarter = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
  close(orpo.orpo_loss(half, quarter, 2.0), LN2 + 2 * math.log(4 / 3))


def test_odds_are_finite_where_an_answer_is_certain():
  value, slope = jax.jit(jax.value_and_grad(orpo.log_odds))(0.0)
  assert np.isfinite(value) and np.isfinite(slope) and value > 16


def test_simpo_compares_mean_log_probabilities_with_gamma():
  w, r, beta, gamma = PI_W / LENGTH_W, PI_L / LENGTH_L, 2.0, 1.0
  expected = np.log(1 + np.exp(gamma + beta * (r - w)))
  actual = simpo.simpo_loss(jnp.asarray(w), jnp.asarray(r), beta, gamma / beta)
  close(actual, expected)


def test_kto_values_each_answer_against_the_point():
  ratio, good = jnp.asarray(PI_W - REF_W), np.arange(7) % 3 > 0
  point, beta = 0.7, 0.3
  actual = kto.kto_loss(ratio, good, point, beta, 1.5, 0.5)
  r = PI_W - REF_W
  for i in range(7):
    if good[i]:
      expected = 1.5 * (1 - sigma(beta * (r[i] - point)))
    else:
      expected = 0.5 * (1 - sigma(beta * (point - r[i])))
    close(actual[i], expected)
  # At the point itself the value is half of lambda.
  close(kto.kto_loss(jnp.full(2, 0.7), jnp.array([True, False]), 0.7), 0.5)


def test_the_point_is_the_mean_of_real_rows_and_never_below_zero():
  ratios, real = jnp.array([3.0, 5.0, 99.0]), jnp.array([True, True, False])
  close(kto.kl_baseline(ratios, real), 4)
  close(kto.kl_baseline(-ratios, real), 0)
  close(kto.kl_baseline(ratios, jnp.zeros(3, bool)), 0)


def test_no_gradient_goes_through_the_point():
  def loss(r):
    z_ref = kto.kl_baseline(r, jnp.ones(3, bool))
    return jnp.sum(kto.kto_loss(jnp.zeros(3), jnp.array([1, 0, 1]), z_ref))

  slope = jax.jit(jax.grad(loss))(jnp.array([1.0, 2.0, 3.0]))
  np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize(
  'loss',
  [
    lambda w, r: dpo.sigmoid_loss(w - r),
    lambda w, r: dpo.sigmoid_loss(w - r, label_smoothing=0.1),
    lambda w, r: dpo.robust_loss(w - r, label_smoothing=0.1),
    lambda w, r: dpo.hinge_loss(w - r),
    lambda w, r: dpo.ipo_loss(w - r),
    orpo.orpo_loss,
    simpo.simpo_loss,
    reward.bradley_terry_loss,
  ],
)
def test_losses_pull_the_chosen_up_and_the_rejected_down(loss):
  w, r = jnp.array([-1.3]), jnp.array([-0.7])
  slopes = jax.grad(lambda *a: jnp.sum(loss(*a)), argnums=(0, 1))
  up, down = jax.jit(slopes)(w, r)
  assert up < 0 < down


def test_kto_pulls_good_answers_up_and_bad_ones_down():
  label = jnp.array([True, False])
  slope = jax.grad(lambda r: jnp.sum(kto.kto_loss(r, label, 0.5)))
  up, down = jax.jit(slope)(jnp.zeros(2))
  # -beta sigma (1 - sigma) with sigma at -0.05 and at 0.05.
  expected = 0.1 * sigma(0.05) * sigma(-0.05)
  close(up, -expected)
  close(down, expected)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'loss': 'slic'}, 'one of sigmoid, hinge, ipo, robust'),
    ({'beta': 0.0}, 'beta is above 0'),
    ({'label_smoothing': 0.5}, 'below 0.5'),
    ({'loss': 'ipo', 'label_smoothing': 0.1}, 'has no effect'),
    ({'sft_weight': -1.0}, 'sft_weight is at least 0'),
  ],
)
def test_settings_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    dpo.DPOSettings(**values)


@pytest.mark.parametrize(
  ('objective', 'key', 'value', 'readers'),
  [
    ('dpo', 'preference.margin', 1.0, 'simpo'),
    ('orpo', 'preference.sft_weight', 0.1, 'dpo or kto or simpo'),
    ('simpo', 'preference.reference', 'precomputed', 'distill or dpo or kto'),
    ('dpo', 'loss.z_loss', 0.1, 'seq2seq or causal'),
    ('causal', 'preference.beta', 0.2, 'dpo or kto or orpo or simpo'),
  ],
)
def test_a_key_that_an_objective_does_not_read_is_refused(
  objective, key, value, readers
):
  config = config_lib.default()
  config.objective = objective
  check_config(config)
  config.update_from_flattened_dict({key: value})
  message = f'{key}={value!r} does nothing with .*, only with {readers};'
  with pytest.raises(ValueError, match=message):
    check_config(config)


def test_an_objective_that_is_not_there_is_refused_with_the_nearest():
  config = config_lib.default()
  config.objective = 'dop'
  with pytest.raises(
    ValueError, match="one of seq2seq, .*; did you mean 'dpo'"
  ):
    check_config(config)


def test_defaults_of_the_settings_are_those_of_a_config():
  config = config_lib.default()
  for spec in OBJECTIVES.values():
    assert spec.settings_from(config) == spec.settings()
