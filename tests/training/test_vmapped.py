# SPDX-License-Identifier: Apache-2.0
"""Trials of one vmapped step take the steps that they take alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.config import program
from moepeft.core.types import State
from moepeft.models.decoder.model import sites
from moepeft.moe import router_state
from moepeft.nn.initializers import init_params
from moepeft.peft import build
from moepeft.training import optimizers, setup
from moepeft.training.vmapped import VmappedStep

from ..contracts import small, small_decoders

STEPS = 3
# Seeds and numbers of four trials of one program.
TRIALS = (
  {'seed': 0, 'optimizer.learning_rate': 1e-3},
  {'seed': 0, 'optimizer.learning_rate': 3e-3},
  {'seed': 1, 'optimizer.learning_rate': 1e-3, 'loss.z_loss': 2**-6},
  {'seed': 2, 'router_losses.load_balance': 0.5, 'router_losses.z': 2**-5},
)
# Weights of losses are powers of two: a router that computes in float32 even
# here rounds the product of its loss and a constant, and not that with an
# argument.
SHARED = {
  'optimizer.weight_decay': 0.1,
  'router_losses.load_balance': 2**-3,
  'router_losses.z': 2**-6,
  'loss.z_loss': 2**-10,
}


def configs(*trials, **shared):
  made = []
  for trial in trials:
    config = config_lib.default()
    config.steps = 7
    changes = SHARED | shared | trial
    made.append(program.with_numbers(config, changes))
  return made


@functools.cache
def base(family):
  """(model without a method -> with one, sites, frozen weights)."""
  if family == 't5':
    return small.t5.T5, small.GATED, small.params()
  shape = small_decoders.CONFIGS[family]
  model, variables = small_decoders.make(shape, 'ia3')
  return type(model), shape, variables['params']


def make(family, method, dtype):
  """(config -> step, config -> (state, batches)) of a method."""
  model_type, shape, params = base(family)
  of_family = small.t5.sites if family == 't5' else sites
  built = build(method, of_family(shape))
  model = model_type(shape, built.adapter_map, dtype=dtype)
  params = jax.tree.map(lambda a: np.asarray(a, dtype), params)

  def make_step(config):
    optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
    optimizer = built.wrap_optimizer(optimizer, config.steps)
    return setup.build_train_step(config, model, built, optimizer)

  def start(config):
    batches = [
      batch_of(family, STEPS * config.seed + step) for step in range(STEPS)
    ]
    variables = init_params(model, batches[0], config.seed, params)
    peft = small.moved(variables['peft'], 0.1, config.seed)
    peft = jax.tree.map(lambda a: jnp.asarray(a, dtype), peft)
    optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
    optimizer = built.wrap_optimizer(optimizer, config.steps)
    init = router_state.optimizer_init(optimizer, built.frozen_arrays)
    rng = jax.random.key(config.seed)
    return State(jnp.int32(0), peft, params, init(peft), rng), batches

  return make_step, start


def batch_of(family, seed):
  batch = jax.tree.map(np.asarray, small.batch(seed=seed))
  if family == 't5':
    return batch
  targets = {k: a for k, a in batch.items() if k.startswith('targets')}
  return targets | {'inputs': batch['decoder_inputs']}


def train_both(family, method, trials, dtype):
  """((losses, trained arrays) of each trial alone, those of all together)."""
  make_step, start = make(family, method, dtype)
  alone = []
  for config in trials:
    step = jax.jit(make_step(config))
    state, batches = start(config)
    losses = []
    for batch in batches:
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss'] + metrics['router_loss']))
    alone.append((losses, jax.tree.map(np.asarray, state.trainable)))
  starts = [start(config) for config in trials]
  step = VmappedStep(make_step, trials, [state for state, _ in starts])
  rows = [step(row) for row in zip(*[b for _, b in starts], strict=True)]
  losses = [
    [float(m['loss'] + m['router_loss']) for m in metrics]
    for metrics in zip(*rows, strict=True)
  ]
  trained = [
    jax.tree.map(np.asarray, step.state(i).trainable)
    for i in range(len(trials))
  ]
  return alone, list(zip(losses, trained, strict=True))


# For .ci/run.
QUICK = 'llama', "molora(experts=3, rank=2, targets='*/q')", TRIALS[1::2], {}
CASES = (
  ('llama', 'molora(experts=3, rank=2)', TRIALS, {}),
  ('llama', 'molora(experts=3, rank=2, router=topk(k=2))', TRIALS, {}),
  ('gemma2', 'mov(experts=3)', TRIALS, {}),
  (
    *('t5', 'molora(experts=3, rank=2)', TRIALS[1::2]),
    {
      'optimizer.name': 'adafactor',
      'batch_size': 3,
      'gradient_accumulation_steps': 3,
    },
  ),
  *(('t5', method, TRIALS[1::2], {}) for method in small.METHODS),
)


@pytest.mark.parametrize(
  ('family', 'method', 'trials', 'changes'),
  [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_trials_together_take_the_steps_that_they_take_alone(
  family, method, trials, changes
):
  with jax.enable_x64(True):
    trials = configs(*trials, **changes)
    alone, together = train_both(family, method, trials, np.float64)
  for (losses, trained), (vmapped_losses, vmapped) in zip(
    alone, together, strict=True
  ):
    # Products that XLA batches may add in another order; float64 rounds at
    # 1e-16. Adam divides by sqrt(v) + 1e-8: rounding of 1e-17 in a gradient
    # that is 0 moves a parameter by 1e-9 of the rate, 3e-3.
    np.testing.assert_allclose(vmapped_losses, losses, rtol=1e-12)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11),
      vmapped,
      trained,
    )
  # The trials are no copies of one another.
  assert len({tuple(losses) for losses, _ in alone}) == len(trials)


@pytest.mark.parametrize('schedule', optimizers.SCHEDULES)
def test_the_rate_of_a_schedule_may_be_an_argument(schedule):
  (config,) = configs(
    {'optimizer.schedule': schedule, 'optimizer.warmup_steps': 2}
  )

  def rate(peak, step):
    changes = {'optimizer.learning_rate': peak}
    traced = program.with_numbers(config, changes)
    return optimizers.make_schedule(traced.optimizer, config.steps)(step)

  steps = np.arange(config.steps)
  expected = [
    optimizers.make_schedule(config.optimizer, config.steps)(step)
    for step in steps
  ]
  traced = jax.jit(jax.vmap(rate, (None, 0)))(1e-3, steps)
  # The peak is divided by the warm-up's steps in float32, not in float64.
  np.testing.assert_allclose(traced, expected, rtol=2**-23)


def test_numbers_are_arguments_and_zeros_and_shapes_are_not():
  (first, other), (zero,), (longer,) = (
    configs(*TRIALS[:2]),
    configs({'router_losses.z': 0}),
    configs({}, batch_size=3),
  )
  assert program.fingerprint(first) == program.fingerprint(other)
  assert program.fingerprint(zero) != program.fingerprint(first)
  assert program.fingerprint(longer) != program.fingerprint(first)
  assert program.numbers(zero) == {
    'optimizer.learning_rate': 1e-3,
    'optimizer.weight_decay': 0.1,
    'loss.z_loss': 2**-10,
    'router_losses.load_balance': 2**-3,
  }
  # The config itself stays as it is.
  assert program.with_numbers(first, {'seed': 5}).seed == 5 != first.seed
