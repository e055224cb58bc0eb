# SPDX-License-Identifier: Apache-2.0
"""Rates and updates by hand, on two numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft import config as config_lib
from moepeft import registries
from moepeft.config import check as config_check
from moepeft.training import optimizers
from moepeft.training.optimizers.adafactor import adafactor

# Adam divides by 1 - 0.999^t, whose float32 rounding of 6e-8 is 6e-5 of it.
CLOSE = dict(rtol=1e-4)
# Root mean square 5: sqrt((1 + 49) / 2).
START = (1.0, 7.0)


def card(**changes):
  c = config_lib.default().optimizer
  c.update({'learning_rate': 0.25, 'max_grad_norm': 0.0, **changes})
  return c


def rates(steps, at, **changes):
  rate = optimizers.make_schedule(card(**changes), steps)
  return [float(rate(step)) for step in at]


def run(config, gradients, steps=100, start=START):
  """(the changes of each step, the optimizer's last state)."""
  optimizer = optimizers.make_optimizer(config, steps)
  params = jnp.array(start, jnp.float32)
  state, changes = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  for gradient in gradients:
    change, state = update(jnp.array(gradient, jnp.float32), state, params)
    params = optax.apply_updates(params, change)
    changes.append(np.asarray(change))
  return changes, state


def test_a_constant_rate_stays_past_the_end():
  assert rates(10, (0, 5, 10, 99), schedule='constant') == [0.25] * 4


def test_a_warm_up_climbs_in_equal_steps_and_does_not_begin_at_zero():
  # A quarter of the rate at each of four steps.
  actual = rates(10, range(6), schedule='constant', warmup_steps=4)
  np.testing.assert_allclose(
    actual, [0.0625, 0.125, 0.1875, 0.25, 0.25, 0.25], **CLOSE
  )
  actual = rates(10, range(3), schedule='constant', warmup_steps=1)
  np.testing.assert_allclose(actual, [0.25] * 3, **CLOSE)


def test_a_linear_rate_falls_evenly_to_zero_at_the_last_step():
  # Without a warm-up a tenth a step; after four steps of it, a sixth.
  actual = rates(10, (0, 1, 5, 9, 10, 11), schedule='linear')
  np.testing.assert_allclose(
    actual, [0.25, 0.225, 0.125, 0.025, 0, 0], atol=1e-8
  )
  actual = rates(10, (3, 4, 5, 7, 10), schedule='linear', warmup_steps=4)
  np.testing.assert_allclose(
    actual, [0.25, 0.25, 0.25 * 5 / 6, 0.125, 0], atol=1e-8
  )


def test_a_cosine_rate_falls_to_zero_at_the_last_step():
  def course(share):
    return 0.25 * (1 + math.cos(math.pi * share)) / 2

  actual = rates(10, (0, 1, 5, 10), schedule='cosine')
  expected = [0.25, course(0.1), 0.125, 0]
  np.testing.assert_allclose(actual, expected, atol=1e-7)
  actual = rates(10, (3, 4, 5, 7, 10), schedule='cosine', warmup_steps=4)
  expected = [0.25, 0.25, course(1 / 6), 0.125, 0]
  np.testing.assert_allclose(actual, expected, atol=1e-7)


def test_adam_goes_by_the_rate_of_each_step():
  # Under a constant gradient both of Adam's means are the gradient's, so each
  # number moves by the rate, against its sign: 1/4, 2/4, 3/4 of 0.25.
  config = card(warmup_steps=4)
  changes, _ = run(config, [(3, -0.02)] * 3)
  expected = [(-r, r) for r in (0.0625, 0.125, 0.1875)]
  np.testing.assert_allclose(changes, expected, **CLOSE)


def test_adam_keeps_means_by_its_two_rates():
  # Second step, gradients 1 then 2, rates 1/2 and 3/4:
  #   m = (1/2 * 1/2 + 1/2 * 2) / (1 - 1/4) = 5/3
  #   v = (3/4 * 1/4 + 1/4 * 4) / (1 - 9/16) = 19/7
  changes, _ = run(card(b1=0.5, b2=0.75), [(1, -1), (2, -2)])
  step = 0.25 * (5 / 3) / math.sqrt(19 / 7)
  np.testing.assert_allclose(changes[1], [-step, step], **CLOSE)


def test_weight_decay_of_adam_is_decoupled_and_goes_with_the_rate():
  # Without a gradient only the decay is left: rate * decay * parameter.
  changes, _ = run(card(weight_decay=0.1), [(0, 0)])
  np.testing.assert_allclose(changes[0], [-0.025, -0.175], **CLOSE)
  changes, _ = run(card(weight_decay=0.1), [(3, -3)])
  np.testing.assert_allclose(changes[0], [-0.275, 0.25 - 0.175], **CLOSE)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_no_weight_decays_unless_asked(name):
  changes, _ = run(card(name=name), [(0, 0)])
  np.testing.assert_array_equal(changes[0], [0, 0])


@pytest.mark.parametrize(
  ('clip', 'gradient', 'expected'),
  [
    # Norm 5 becomes 1; norm 1/2 is left alone; zero is no limit.
    (1.0, (3, 4), (0.6, 0.8)),
    (1.0, (0.3, 0.4), (0.3, 0.4)),
    (0.0, (3, 4), (3, 4)),
  ],
)
def test_a_gradient_is_scaled_down_to_the_norm(clip, gradient, expected):
  # Adam does not feel a gradient's size at first, but its mean remembers.
  _, state = run(card(max_grad_norm=clip, b1=0.5), [gradient])
  mean = optax.tree_utils.tree_get(state, 'mu')
  np.testing.assert_allclose(mean, np.multiply(0.5, expected), **CLOSE)


def test_adafactor_goes_by_the_scale_of_the_parameter():
  # The first step's second moment is the gradient's square: every number goes
  # by the rate times the root mean square 5 of the parameter.
  changes, _ = run(card(name='adafactor'), [(3, -0.02)])
  np.testing.assert_allclose(changes[0], [-1.25, 1.25], **CLOSE)
  # A parameter of zeros, as B is at first, goes by 1e-3 of the rate.
  changes, _ = run(card(name='adafactor'), [(3, -0.02)], start=(0, 0))
  np.testing.assert_allclose(changes[0], [-2.5e-4, 2.5e-4], **CLOSE)


def test_adafactor_forgets_by_its_clock_and_clips_its_update():
  # At step 2 the old second moment counts 1 - 2^-0.8 = 0.4257.
  old = 1 - 2**-0.8
  start = np.array(START)
  for second, clipped in ((0.5, False), (3.0, True)):
    changes, _ = run(card(name='adafactor'), [(1, -1), (second, -second)])
    update = second / math.sqrt(old + (1 - old) * second**2)
    assert (update > 1) == clipped
    scale = math.sqrt(np.mean((start + (-1.25, 1.25)) ** 2))
    step = 0.25 * min(update, 1.0) * scale
    np.testing.assert_allclose(changes[1], [-step, step], **CLOSE)


def test_weight_decay_of_adafactor_does_not_go_with_the_rate():
  # As in T5X, (1 - decay) * parameter; a tenth of it, whatever the rate.
  config = card(name='adafactor', weight_decay=0.1)
  changes, _ = run(config, [(3, -3)])
  np.testing.assert_allclose(changes[0], [-1.25 - 0.1, 1.25 - 0.7], **CLOSE)


def test_the_clock_of_the_config_is_adafactor_s():
  # At the released clock a second, smaller gradient is hardly felt: moments
  # are c g^2 and c (g^2 + (g / 1000)^2), c = 1.1e6^-0.8 = 1.4686e-5, so that
  # the update is 0.001 / sqrt(c) = 0.2609 of the sign, under the clipping.
  config = card(name='adafactor', decay_initial_step=1_100_000)
  changes, _ = run(config, [(1, -1), (1e-3, -1e-3)])
  scale = math.sqrt(np.mean((np.array(START) + (-1.25, 1.25)) ** 2))
  step = 0.25 * 0.2609 * scale
  # T5X rounds c to 1 / 246 of itself.
  np.testing.assert_allclose(changes[1], [-step, step], rtol=2e-3)
  # At no clock the first gradient counts 1 - 2^-0.8 = 0.4257.
  changes, _ = run(card(name='adafactor'), [(1, -1), (1e-3, -1e-3)])
  step = 0.25 * 1e-3 / math.sqrt(0.4257) * scale
  np.testing.assert_allclose(changes[1], [-step, step], rtol=1e-4)


@pytest.mark.parametrize('clip', [0.0, 1.0])
def test_names_that_do_not_exist_are_errors(clip):
  with pytest.raises(ValueError, match="no optimizer 'adamwx'.*mean 'adamw'"):
    optimizers.make_optimizer(card(name='adamwx', max_grad_norm=clip), 10)
  with pytest.raises(ValueError, match="no schedule 'cosin'.*mean 'cosine'"):
    optimizers.make_optimizer(card(schedule='cosin', max_grad_norm=clip), 10)


def test_a_key_that_the_optimizer_does_not_read_is_refused():
  config = config_lib.default()
  config_check.check(config, registries.BY_KEY)
  config.optimizer.decay_initial_step = 7
  with pytest.raises(
    ValueError, match="decay_initial_step=7 does nothing with .*'adamw'"
  ):
    config_check.check(config, registries.BY_KEY)


def test_every_key_of_an_entry_is_a_key_of_the_config():
  defaults = config_lib.default().optimizer
  for spec in (*optimizers.OPTIMIZERS.values(), *optimizers.SCHEDULES.values()):
    assert set(spec.keys) <= set(defaults)


PARAMS = {
  'encoder': {
    'layers': {
      'q': {
        'router': {'kernel': jnp.full((2, 3), 5.0)},
        'molora': {'a': jnp.full((2, 3), 3.0), 'b': jnp.full((2, 5), 2.0)},
      }
    }
  }
}
GRADIENT = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size) + 1.0), PARAMS)
GRADIENT = jax.tree.map(lambda g, a: g.reshape(a.shape), GRADIENT, PARAMS)
GROUPS = '*/router/*: learning_rate=0.125, weight_decay=0; */b: weight_decay=3'


def train_steps(optimizer, count=3):
  params, state = PARAMS, optimizer.init(PARAMS)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(GRADIENT, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(count):
    params, state = step(params, state)
  return params


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_groups_are_optax_s_multi_transform_with_their_own_values(name):
  config = card(
    name=name,
    groups=GROUPS,
    weight_decay=0.5,
    max_grad_norm=0.75,
    schedule='linear',
    warmup_steps=1,
  )
  labels = {
    'encoder': {
      'layers': {
        'q': {'router': {'kernel': 'r'}, 'molora': {'a': 'a', 'b': 'b'}}
      }
    }
  }

  def by_hand(rate, decay):
    schedule = optax.join_schedules(
      [optax.constant_schedule(rate), optax.linear_schedule(rate, 0, 9)], [1]
    )
    if name == 'adamw':
      return optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=decay)
    return adafactor(schedule, decay)

  expected = optax.chain(
    optax.clip_by_global_norm(0.75),
    optax.multi_transform(
      {
        'r': by_hand(0.125, 0.0),
        'a': by_hand(0.25, 0.5),
        'b': by_hand(0.25, 3.0),
      },
      labels,
    ),
  )
  actual = train_steps(optimizers.make_optimizer(config, 10))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
    actual,
    train_steps(expected),
  )
  # Without groups each of the two others goes elsewhere.
  plain = train_steps(optimizers.make_optimizer(card(name=name), 10))
  changed = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), actual, plain)
  assert all(jax.tree.leaves(changed))


def test_a_rate_ratio_is_of_the_runs_learning_rate():
  # The rate of the card is 0.25.
  by_ratio, by_rate = (
    train_steps(optimizers.make_optimizer(card(groups=groups), 10))
    for groups in ('*/b: rate_ratio=3', '*/b: learning_rate=0.75')
  )
  jax.tree.map(np.testing.assert_array_equal, by_ratio, by_rate)


def test_the_first_pattern_that_matches_decides():
  config = card(groups='*/router/*: learning_rate=0; */q/*: learning_rate=1')
  actual = train_steps(optimizers.make_optimizer(config, 10))
  layer, start = (t['encoder']['layers']['q'] for t in (actual, PARAMS))
  np.testing.assert_array_equal(
    layer['router']['kernel'], start['router']['kernel']
  )
  assert (layer['molora']['a'] != start['molora']['a']).all()


@pytest.mark.parametrize(
  ('groups', 'message'),
  [
    ('*/ruoter/*: learning_rate=1', "no trained parameter matches '.*ruoter"),
    ('*: weight_decay=1; */b: weight_decay=2', 'earlier patterns .* put it'),
  ],
)
def test_a_pattern_that_decides_nothing_is_an_error(groups, message):
  optimizer = optimizers.make_optimizer(card(groups=groups), 10)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(optimizer.init, PARAMS)


@pytest.mark.parametrize(
  ('groups', 'message'),
  [
    ('*/router/*', 'pattern: key=value, separated by semicolons'),
    (': learning_rate=1', 'pattern: key=value'),
    ('a: rate=1', "rate_ratio or weight_decay, .*; got 'rate=1'"),
    ('a: rate_ratio=2, learning_rate=1', 'got both in .*: leave one out'),
    ('a: learning_rate', "got 'learning_rate'"),
    ('a: learning_rate=fast', "learning_rate is a number; got 'fast'"),
    ('a: weight_decay=-1', 'weight_decay is at least 0'),
    ('a: learning_rate=nan', 'learning_rate is at least 0'),
  ],
)
def test_a_text_of_groups_that_cannot_be_read_is_one_sentence(groups, message):
  with pytest.raises(ValueError, match=message):
    optimizers.make_optimizer(card(groups=groups), 10)
