# SPDX-License-Identifier: Apache-2.0
"""A batch in parts gives what the whole batch gives, and not a mean of means.

Sums in float32 are added in another order: 1e-5 of the largest number is some
hundred roundings, and what a mean of means does is above 1e-2.
"""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft.core.types import State
from moepeft.moe import aux_losses
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.objectives.seq2seq import loss_sums
from moepeft.training import grad_accumulation
from moepeft.training.setup import build_train_step

from ..contracts import small
from . import test_update

MOLORA = 'molora(experts=3, rank=2)'
ROWS = 6
# Rows of 5, 3, 2, 2, 2 and 2 real targets: parts have unlike amounts.
BATCH = small.batch(rows=ROWS)
ROUTER_LOSSES = dict(
  load_balance=0.5, z=0.3, entropy=0.2, importance=0.4, generalized_js=0.1
)


def config_of(parts, loss=(), **router_losses):
  config = config_lib.default()
  config.batch_size, config.gradient_accumulation_steps = ROWS, parts
  config.loss.update(dict(loss))
  config.router_losses.update(router_losses)
  return config


def step(parts, method=MOLORA, batch=BATCH, optimizer=None, **options):
  """(change of the adapter, the optimizer's state, aux) of one update."""
  model, built, variables = test_update.make(method, 0.5)
  optimizer = optimizer or optax.sgd(1.0)
  state = test_update.make_state(variables, optimizer)
  config = config_of(parts, **options)
  run = jax.jit(build_train_step(config, model, built, optimizer))
  after, aux = run(state, batch)
  change = jax.tree.map(np.subtract, after.trainable, state.trainable)
  return change, after.opt, aux


def check_equal(found, expected):
  def check(a, b):
    most = np.max(np.abs(b), initial=0)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * most)

  jax.tree.map(check, found, expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


@pytest.mark.parametrize(('parts', 'per'), [(2, 'sequences'), (6, 'tokens')])
def test_parts_add_up_to_the_whole_batch(parts, per):
  loss = dict(average_over=per, z_loss=0.01, label_smoothing=0.1)
  expected, actual = step(1, loss=loss), step(parts, loss=loss)
  check_equal(actual, expected)
  assert all(np.abs(a).max() > 1e-4 for a in jax.tree.leaves(expected[0]))


def test_router_losses_are_those_of_the_whole_batch():
  assert ROUTER_LOSSES.keys() == aux_losses.LOSSES.keys()
  expected = step(1, **ROUTER_LOSSES)
  check_equal(step(3, **ROUTER_LOSSES), expected)
  # They count in it.
  kernel = test_update.adapter(as_state(expected[0]))['router']['kernel']
  without = test_update.adapter(as_state(step(1)[0]))['router']['kernel']
  assert np.abs(kernel - without).max() > 1e-3


def as_state(tree):
  return State(step=0, trainable=tree, frozen=None, opt=None, rng=None)


def test_a_mean_of_the_parts_means_would_be_another():
  model, _, variables = test_update.make(MOLORA, 0.5)

  @jax.jit
  def mean_of(rows):
    return mean_loss(*loss_sums(model.apply, variables, rows, None))

  three = grad_accumulation.split(BATCH, 3)
  each = [mean_of({k: a[i] for k, a in three.items()}) for i in range(3)]
  assert abs(np.mean(each) - mean_of(BATCH)) > 1e-2


@pytest.mark.slow
def test_a_model_of_many_layers_is_trained_the_same_in_parts():
  model, built = small.make(MOLORA)
  variables = small.variables(MOLORA, noise=0.1)
  optimizer = optax.sgd(1.0)

  def run(parts):
    config = config_of(
      parts, dict(average_over='sequences'), load_balance=0.1, z=0.1
    )
    state = test_update.make_state(variables, optimizer)
    update = jax.jit(build_train_step(config, model, built, optimizer))
    after, aux = update(state, BATCH)
    change = jax.tree.map(np.subtract, after.trainable, state.trainable)
    return change, aux

  check_equal(run(3), run(1))


def test_packed_examples_count_the_same_in_parts():
  # Rows of two segments, but for the shortest.
  real = BATCH['targets_mask']
  segments = jnp.where(jnp.arange(5) < 2, 1, 2) * real
  batch = BATCH | {'targets_segments': segments}
  options = dict(batch=batch, loss=dict(average_over='sequences'))
  expected = step(1, **options)
  assert int(expected[2]['weight']) == 8
  check_equal(step(3, **options), expected)


def test_a_batch_without_a_real_token_leaves_the_weights_alone():
  none = BATCH | {'targets_mask': jnp.zeros_like(BATCH['targets_mask'])}
  for parts in (1, 3):
    change, _, aux = step(parts, batch=none)
    assert float(aux['loss']) == 0 == float(aux['gradient_norm'])
    assert all((a == 0).all() for a in jax.tree.leaves(change))


def test_no_part_is_without_rows():
  with pytest.raises(ValueError, match='6 does not divide by .* 4;'):
    build_train_step(
      config_of(4), *test_update.make(MOLORA)[:2], optax.sgd(1.0)
    )


def toy(trainable, rows, rng):
  """Sums with noise: t x and t u, u of the part's own."""
  noise = jax.random.uniform(rng)
  return {
    'total': trainable * jnp.sum(rows['x']),
    'routing': trainable * noise,
    'noise': noise,
    'weight': jnp.int32(rows['x'].size),
  }


X = jnp.array([1.0, 2.0, 4.0, 8.0])
KEY = jax.random.key(3)


def test_every_part_has_noise_of_its_own_and_a_single_one_the_step_s():
  def run(parts):
    loss = lambda sums: (mean_loss(sums['total'], sums), sums)  # noqa: E731
    return grad_accumulation.gradient(
      toy, loss, jnp.float32(5), {'x': X}, KEY, parts
    )

  expected = [jax.random.uniform(jax.random.fold_in(KEY, i)) for i in range(2)]
  # The mean of t x is linear in t: 15 / 4.
  slope, sums = run(2)
  np.testing.assert_allclose(slope, 3.75, rtol=1e-6)
  np.testing.assert_allclose(sums['noise'], sum(expected), rtol=1e-6)
  assert abs(expected[0] - expected[1]) > 0.01
  slope, sums = run(1)
  np.testing.assert_allclose(slope, 3.75, rtol=1e-6)
  assert float(sums['noise']) == float(jax.random.uniform(KEY))


def test_both_passes_have_the_same_noise():
  # L = mean(t x) + (sum t u)^2, so dL/dt = 15/4 + 2 t (sum u)^2.
  def loss(sums):
    return mean_loss(sums['total'], sums) + sums['routing'] ** 2, sums

  slope, sums = grad_accumulation.gradient(
    toy, loss, jnp.float32(5), {'x': X}, KEY, 2, nonlinear=('routing',)
  )
  noise = float(sums['noise'])
  np.testing.assert_allclose(slope, 3.75 + 10 * noise**2, rtol=1e-6)


def test_gradients_have_the_parameters_dtype():
  # Summed in float32: 1 + 8 parts of 2^-9 would stay 1 in bfloat16.
  def sums(trainable, rows, rng):
    total = trainable.astype(jnp.float32) * jnp.sum(rows['x'])
    return {'total': total, 'weight': jnp.int32(0)}

  x = jnp.array([1.0, *[2.0**-9] * 8])
  actual, _ = grad_accumulation.gradient(
    sums,
    lambda sums: (mean_loss(sums['total'], sums), {}),
    jnp.bfloat16(1),
    {'x': x},
    KEY,
    9,
  )
  assert actual.dtype == jnp.bfloat16
  # 1 + 2^-6, which bfloat16 can say.
  assert float(actual) == 1 + 2**-6


def test_part_i_has_every_nth_row_from_i_on():
  actual = grad_accumulation.split({'x': jnp.arange(12).reshape(6, 2)}, 3)['x']
  np.testing.assert_array_equal(
    actual, [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
  )


_LOCAL = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moepeft.training import grad_accumulation as accumulate
from moepeft.objectives.cross_entropy import loss_divisors
assert jax.device_count() == 8
mesh = Mesh(jax.devices(), ('data',))
put = lambda *axes: NamedSharding(mesh, P(*axes))
rows = jax.ShapeDtypeStruct((48, 5), jnp.int32, sharding=put('data'))
split = jax.jit(
  lambda batch: accumulate.split(batch, 3), out_shardings=put(None, 'data')
)
lengths = jax.jit(
  lambda s: loss_divisors(
    {'targets_mask': s > 0, 'targets_segments': s}, 'sequences'
  )[0],
  out_shardings=put('data'),
)
for fn in (split, lengths):
  text = fn.lower(rows).compile().as_text()
  for word in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce'):
    assert word not in text, text
# The check can fail: parts of neighbours are sent about.
blocks = jax.jit(
  lambda x: x.reshape(3, 16, 5), out_shardings=put(None, 'data')
)
text = blocks.lower(rows).compile().as_text()
assert 'all-' in text or 'collective-permute' in text
"""


def test_devices_keep_their_rows_in_every_part():
  flags = '--xla_force_host_platform_device_count=8'
  env = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', _LOCAL], env=env, check=True)
