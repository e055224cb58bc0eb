# SPDX-License-Identifier: Apache-2.0
"""Distillation: the divergence from a teacher, by torch and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.objectives import OBJECTIVES
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.distill import DistillSettings, divergences

ROWS, LENGTH, VOCAB = 3, 5, 7


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TEACHER, STUDENT = (2 * normal(i, ROWS, LENGTH, VOCAB) for i in (0, 1))
BATCH = {
  'targets': np.random.default_rng(2).integers(VOCAB, size=(ROWS, LENGTH)),
  'targets_mask': np.arange(LENGTH) < np.array([[5], [3], [0]]),
}


def run(student, batch=BATCH, teacher=TEACHER, **settings):
  """(sum, aux) where the student's logits are its only variable."""
  objective = OBJECTIVES['distill'].build(
    DistillSettings(**settings),
    lambda variables, rows: teacher[: len(rows['targets'])],
  )

  def apply(variables, rows, **options):
    del rows, options
    return variables, {}

  return objective(apply, student, batch, None)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_the_loss_is_torchs_divergence_at_a_temperature(temperature):
  torch = pytest.importorskip('torch')
  log_q, log_p = (
    torch.log_softmax(torch.tensor(x) / temperature, -1)
    for x in (STUDENT, TEACHER)
  )
  expected = torch.nn.functional.kl_div(
    log_q, log_p, log_target=True, reduction='none'
  ).sum(-1)
  expected = temperature**2 * expected.numpy()
  # float32, whose logits are below 10.
  np.testing.assert_allclose(
    divergences(TEACHER, STUDENT, temperature), expected, rtol=1e-5, atol=1e-6
  )
  total, aux = run(STUDENT, temperature=temperature)
  mask = BATCH['targets_mask']
  np.testing.assert_allclose(total, expected[mask].sum(), rtol=1e-5)
  assert aux['weight'] == aux['tokens'] == 5 + 3
  np.testing.assert_allclose(
    mean_loss(total, aux), expected[mask].mean(), rtol=1e-5
  )


def test_the_teacher_itself_has_no_loss_and_no_gradient():
  (total, aux), gradient = jax.value_and_grad(run, has_aux=True)(TEACHER)
  # The gradient is q - p, equal numbers of float32.
  assert abs(total) < 1e-5 and np.abs(gradient).max() < 1e-6
  np.testing.assert_array_equal(aux['metrics']['agreement'], [8, 8])


def test_the_gradient_is_q_minus_p_over_the_temperature_on_targets_alone():
  gradient = jax.grad(lambda x: run(x, temperature=2.0)[0])(STUDENT)
  q, p = (jax.nn.softmax(x / 2.0) for x in (STUDENT, TEACHER))
  # T^2 (q - p) / T.
  expected = np.where(BATCH['targets_mask'][..., None], 2.0 * (q - p), 0)
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_parts_of_a_batch_add_up():
  parts = [
    run(
      STUDENT[i : i + 1],
      {k: v[i : i + 1] for k, v in BATCH.items()},
      TEACHER[i : i + 1],
    )
    for i in range(ROWS)
  ]
  total, aux = run(STUDENT)
  np.testing.assert_allclose(sum(part[0] for part in parts), total, rtol=1e-6)
  for name in ('weight', 'nll', 'correct'):
    np.testing.assert_allclose(
      sum(part[1][name] for part in parts), aux[name], rtol=1e-6
    )


def test_labels_do_not_change_the_loss():
  shifted = BATCH | {'targets': (BATCH['targets'] + 1) % VOCAB}
  assert run(STUDENT, shifted)[0] == run(STUDENT)[0]
  assert run(STUDENT, shifted)[1]['nll'] != run(STUDENT)[1]['nll']


def test_bfloat16_is_computed_in_float32():
  student = jnp.asarray(STUDENT, jnp.bfloat16)
  assert divergences(student, student, 1.0).dtype == jnp.float32


@pytest.mark.parametrize('temperature', [0.0, -1.0, float('nan')])
def test_another_temperature_is_refused(temperature):
  with pytest.raises(ValueError, match='^config.distill.temperature is above'):
    DistillSettings(temperature)
