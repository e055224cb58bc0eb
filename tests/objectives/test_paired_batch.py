# SPDX-License-Identifier: Apache-2.0
"""Objectives of compared and judged answers, on logits that are given."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import PAIR
from moepeft.objectives import OBJECTIVES, paired_batch
from moepeft.objectives.cross_entropy import mean_loss

from ..contracts import small

B, T, V = 3, 5, 37
# Unlike answers, of 5, 3 and 2 tokens; the same length on both sides.
CHOSEN, REJECTED = small.batch(seed=0), small.batch(seed=1)
LOGITS, REFERENCE = jax.random.normal(jax.random.key(0), (2, B, 2, T, V))
PAIRS = {f'chosen_{k}': v for k, v in CHOSEN.items()} | {
  f'rejected_{k}': v for k, v in REJECTED.items()
}
JUDGED = (
  CHOSEN
  | {f'kl_{k}': v for k, v in REJECTED.items()}
  | {'label': jnp.array([True, False, True])}
)
every = pytest.mark.parametrize(
  'name', [n for n, spec in OBJECTIVES.items() if spec.batch != 'single']
)


def batch_of(name):
  return JUDGED if name == 'kto' else PAIRS


@functools.cache
def run(name, settings):
  """(logits [b, 2, t, v], the reference's, batch) -> (mean loss, aux)."""

  @jax.jit
  def value(logits, reference, batch):
    # A batch of one side is the first, KTO's own answers, or its second.
    def pick(arrays, rows, mismatched):
      if len(rows['inputs']) == 2 * len(arrays):
        return arrays.reshape(-1, T, V)
      return arrays[:, int(mismatched)]

    mismatched = [name == 'kto', name == 'kto']

    def apply(variables, rows, train, rngs, mutable):
      del variables, train, rngs, mutable
      picked = pick(logits, rows, mismatched[0])
      mismatched[0] = False
      return picked, {}

    def log_p(variables, rows):
      del variables
      picked = paired_batch.token_logps(
        pick(reference, rows, mismatched[1]), rows
      )
      mismatched[1] = False
      return picked

    objective = OBJECTIVES[name].build(settings, log_p)
    batch = objective.prepare(apply, {}, batch)
    total, aux = objective(apply, {}, batch, None)
    return mean_loss(total, aux), aux

  return value


def value(name, logits=LOGITS, reference=REFERENCE, batch=None, **settings):
  batch = batch_of(name) if batch is None else batch
  return run(name, OBJECTIVES[name].settings(**settings))(
    logits, reference, batch
  )


def summed(logits, batch):
  """log p of each row's real targets, by numpy: [b]."""
  x = np.asarray(logits, np.float64)
  log_p = x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
  target_log_p = np.take_along_axis(
    log_p, np.asarray(batch['targets'])[..., None], -1
  )
  return np.sum(
    target_log_p[..., 0] * np.asarray(batch['targets_mask']), axis=-1
  )


def ratios(side, batch):
  return summed(LOGITS[:, side], batch) - summed(REFERENCE[:, side], batch)


def metrics(aux):
  return {k: float(v[0] / v[1]) for k, v in aux['metrics'].items()}


def test_sides_of_a_row_become_neighbours():
  stacked = paired_batch.stack_sides(PAIRS, PAIR)
  assert stacked.keys() == CHOSEN.keys()
  for key in stacked:
    np.testing.assert_array_equal(stacked[key][0::2], CHOSEN[key])
    np.testing.assert_array_equal(stacked[key][1::2], REJECTED[key])


def test_dpo_is_the_mean_over_pairs_of_its_formula():
  w, r = ratios(0, CHOSEN), ratios(1, REJECTED)
  expected = np.mean(np.log1p(np.exp(-0.3 * (w - r))))
  loss, aux = value('dpo', beta=0.3)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  means = metrics(aux)
  np.testing.assert_allclose(means['rewards_chosen'], 0.3 * w.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    means['rewards_rejected'], 0.3 * r.mean(), rtol=1e-5
  )
  np.testing.assert_allclose(means['margins'], 0.3 * (w - r).mean(), rtol=1e-5)
  assert means['accuracies'] == pytest.approx(np.mean(w > r))
  assert int(aux['weight']) == 3
  # 5 + 3 + 2 chosen targets.
  assert int(aux['tokens']) == 10
  nll = -summed(LOGITS[:, 0], CHOSEN).sum()
  np.testing.assert_allclose(aux['nll'], nll, rtol=1e-5)


def test_ipo_takes_means_over_the_tokens_of_each_answer():
  lengths = np.array([5, 3, 2])
  h = (ratios(0, CHOSEN) - ratios(1, REJECTED)) / lengths
  loss, _ = value('dpo', loss='ipo', beta=0.3)
  np.testing.assert_allclose(loss, np.mean((h - 1 / 0.6) ** 2), rtol=1e-5)


def test_sft_adds_the_chosen_s_mean_cost_of_a_token():
  nll = np.mean(-summed(LOGITS[:, 0], CHOSEN) / np.array([5, 3, 2]))
  plain, with_sft = value('dpo')[0], value('dpo', sft_weight=0.5)[0]
  np.testing.assert_allclose(with_sft - plain, 0.5 * nll, rtol=1e-5)


def test_simpo_compares_means_and_no_reference():
  w, r = (
    summed(LOGITS[:, i], batch) / np.array([5, 3, 2])
    for i, batch in enumerate((CHOSEN, REJECTED))
  )
  expected = np.mean(np.log1p(np.exp(-2 * (w - r - 0.3))))
  loss, aux = value('simpo', beta=2.0, margin=0.3)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert 'kl' not in aux['metrics']


def test_a_reward_is_the_logit_of_padding_at_the_last_target():
  # Rows of 5, 3 and 2 targets: places 4, 2 and 1.
  w, r = (
    np.array([float(LOGITS[b, i, t, 0]) for b, t in enumerate((4, 2, 1))])
    for i in (0, 1)
  )
  loss, aux = value('reward')
  np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(r - w))), rtol=1e-5)
  assert metrics(aux)['rewards_chosen'] == pytest.approx(w.mean(), rel=1e-5)


def test_kto_values_answers_against_mismatched_ones():
  ratio, mismatched = ratios(0, CHOSEN), ratios(1, REJECTED)
  point = max(0.0, mismatched.mean())
  good = np.asarray(JUDGED['label'])
  gain = 0.3 * np.where(good, ratio - point, point - ratio)
  weights = np.where(good, 1.5, 0.5)
  expected = np.mean(weights / (1 + np.exp(gain)))
  settings = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
  loss, aux = value('kto', **settings)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  means = metrics(aux)
  assert means['z_ref'] == pytest.approx(point, rel=1e-5)
  mean_good = 0.3 * ratio[good].mean()
  assert means['rewards_chosen'] == pytest.approx(mean_good, rel=1e-5)
  assert means['accuracies'] == pytest.approx(np.mean(gain > 0))
  # Five and two targets of the good answers.
  assert int(aux['tokens']) == 7


@pytest.mark.parametrize('name', ['dpo', 'kto'])
def test_policy_and_reference_alike_cost_what_chance_does(name):
  loss, aux = value(name, reference=LOGITS)
  # ln 2, and 1 - sigma(0); both exact, as tokens' ratios are zero.
  expected = {'dpo': math.log(2), 'kto': 0.5}[name]
  assert float(loss) == pytest.approx(expected, abs=1e-7)
  means = metrics(aux)
  assert means['kl'] == 0 and means['accuracies'] == 0.5


@pytest.mark.parametrize('name', ['dpo', 'kto'])
def test_a_reference_computed_before_is_the_same_reference(name):
  expected, _ = value(name)
  keys = ('', 'kl_') if name == 'kto' else ('chosen_', 'rejected_')
  precomputed = {
    f'{key}reference': paired_batch.token_logps(REFERENCE[:, i], batch)
    for i, (key, batch) in enumerate(zip(keys, (CHOSEN, REJECTED), strict=True))
  }
  # What the model would say is then of no account.
  loss, _ = value(
    name, reference=0 * LOGITS, batch=batch_of(name) | precomputed
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


@every
def test_the_order_of_rows_does_not_count(name):
  order = jnp.array([2, 0, 1])
  batch = {k: v[order] for k, v in batch_of(name).items()}
  expected, aux = value(name)
  loss, permuted_aux = value(name, LOGITS[order], REFERENCE[order], batch)
  # Sums in another order.
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert metrics(permuted_aux) == pytest.approx(metrics(aux), rel=1e-5)


@every
def test_rows_that_fill_a_batch_up_do_not_count(name):
  filled = {k: jnp.concatenate([v, v[:1]]) for k, v in batch_of(name).items()}
  for key in filled:
    if key.endswith('_mask'):
      filled[key] = filled[key].at[-1].set(False)
  more = lambda x: jnp.concatenate([x, 9 * x[:1]])  # noqa: E731
  expected, aux = value(name)
  loss, filled_aux = value(name, more(LOGITS), more(REFERENCE), filled)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert int(filled_aux['weight']) == 3
  assert metrics(filled_aux) == pytest.approx(metrics(aux), rel=1e-5)


@every
def test_what_is_masked_has_no_gradient(name):
  slope = jax.grad(lambda x: value(name, x)[0])(LOGITS)
  real = jnp.stack([CHOSEN['targets_mask'], REJECTED['targets_mask']], axis=1)
  np.testing.assert_array_equal(jnp.where(real[..., None], 0, slope), 0)
  assert float(jnp.abs(slope).max()) > 1e-4
  # The mismatched answers of KTO have none at all.
  assert name != 'kto' or float(jnp.abs(slope[:, 1]).max()) == 0


def test_a_margin_within_rounding_is_a_tie():
  # 0 and 2e-4 are within what is a tie, 1e-3 is not.
  margins = jnp.array([0.0, 2e-4, -2e-4, 1e-3, -1e-3])
  results = paired_batch.wins(margins, jnp.full(5, 4e-4))
  np.testing.assert_array_equal(results, [0.5, 0.5, 0.5, 1, 0])
