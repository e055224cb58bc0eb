# SPDX-License-Identifier: Apache-2.0
"""Adafactor against its definition in NumPy, stacked and layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.models import weight_mapping
from moepeft.training.optimizers.adafactor import adafactor

from ..contracts import small

RATE, CLOCK, STEPS, LAYERS = 0.3, 1_100_000, 20, 3
# Of one layer: those of adapters, then matrices large enough to be factored
# in T5X, where heads and their size are one axis.
SHAPES = {
  'self/q/molora/a': (11, 3, 2),
  'self/q/molora/b': (3, 2, 3, 5),
  'self/q/molora/router/kernel': (11, 3),
  'self/k/mov/scale': (3, 3, 5),
  'self/o/lora/a': (3, 5, 2),
  'mlp/act/ia3/scale': (17,),
  'mlp/wi_0/kernel': (131, 137),
  'self/q/kernel': (131, 3, 47),
  'self/o/kernel': (3, 47, 131),
}
# Their (row axes, column axes) in a layer.
FACTORED = {
  'mlp/wi_0/kernel': ((0,), (1,)),
  'self/q/kernel': ((0,), (1, 2)),
  'self/o/kernel': ((0, 1), (2,)),
}


def tree(flat):
  return weight_mapping.unflatten(
    {f'encoder/layers/{path}': jnp.asarray(a) for path, a in flat.items()}
  )


def arrays(seed, scale):
  rng = np.random.default_rng(seed)
  return {
    path: np.float32(scale * rng.standard_normal((LAYERS, *shape)))
    for path, shape in SHAPES.items()
  }


@functools.cache
def start():
  """Layers of scales that differ; B is zeros, whose scale is the least."""
  actual = arrays(99, 0.3)
  for path, array in actual.items():
    array *= np.array([1, 3, 9]).reshape(-1, *[1] * (array.ndim - 1))
    array *= not path.endswith('/b')
  return actual


@functools.cache
def gradients():
  """They shrink, but for two: some updates are clipped, some are not.

  Layers differ in size, which one root mean square of all would not see.
  """
  actual = [
    arrays(i, 300 if i in (7, 13) else 100 / 2**i) for i in range(STEPS)
  ]
  for step in actual:
    for array in step.values():
      array *= np.array([1, 10, 0.1]).reshape(-1, *[1] * (array.ndim - 1))
  return actual


def by_definition(path, layer, clock, weight_decay=0.0):
  """One layer's array after 20 steps, and how often it was clipped; float64.

  Shazeer and Stern (arXiv:1804.04235), algorithms 4 and 5, with T5X's clock.
  """
  p = start()[path][layer].astype(np.float64)
  rows, columns = FACTORED.get(path, ((), ()))
  v = r = c = 0.0
  clipped = 0
  for step, g in enumerate(gradients()):
    g = g[path][layer].astype(np.float64)
    # T5X has its decay in float32: 1 - decay is rounded to a multiple of
    # 2^-24, here by 0.2 %.
    t = np.float32(clock + step) + np.float32(1)
    keep = float(np.float32(1) - t ** np.float32(-0.8))
    square = g**2 + 1e-30
    if rows:
      r = keep * r + (1 - keep) * square.mean(columns, keepdims=True)
      c = keep * c + (1 - keep) * square.mean(rows, keepdims=True)
      v = r * c / r.mean()
    else:
      v = keep * v + (1 - keep) * square
    u = g / np.sqrt(v)
    size = np.sqrt(np.mean(u**2))
    clipped += size > 1
    scale = max(1e-3, np.sqrt(np.mean(p**2)))
    p = (1 - weight_decay) * p - RATE * scale * u / max(1, size)
  return p, clipped


@functools.cache
def trained(clock, weight_decay=0.0, apart=False):
  """({path: array} after 20 steps, the optimizer's state)."""
  optimizer = adafactor(lambda step: RATE, weight_decay, clock)
  form = (lambda flat: small.unstack(tree(flat))) if apart else tree

  @jax.jit
  def update(params, state, gradient):
    changes, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, changes), state

  params = form(start())
  state = jax.jit(optimizer.init)(params)
  for gradient in gradients():
    params, state = update(params, state, form(gradient))
  return weight_mapping.flatten(jax.tree.map(np.asarray, params)), state


@pytest.mark.parametrize('clock', [CLOCK, 0])
@pytest.mark.parametrize('path', SHAPES)
def test_twenty_steps_are_those_of_the_definition(path, clock):
  actual, _ = trained(clock)
  for layer in range(LAYERS):
    expected, clipped = by_definition(path, layer, clock)
    # The case covers both: updates as they are, and clipped ones.
    assert 0 < clipped < STEPS
    # Rounding of float32 in 20 steps, where a number is near zero too.
    error = np.max(np.abs(expected)) * 1e-6
    np.testing.assert_allclose(
      actual[f'encoder/layers/{path}'][layer], expected, rtol=2e-5, atol=error
    )


def test_weight_decay_takes_its_share_whatever_the_rate():
  actual, _ = trained(CLOCK, 0.01)
  for path in ('self/q/molora/a', 'self/q/kernel'):
    expected, _ = by_definition(path, 1, CLOCK, 0.01)
    # Rounding of float32 in 20 steps, where a number is near zero too.
    error = np.max(np.abs(expected)) * 1e-6
    np.testing.assert_allclose(
      actual[f'encoder/layers/{path}'][1], expected, rtol=2e-5, atol=error
    )


def test_stacked_layers_go_where_layers_apart_do():
  stacked, _ = trained(CLOCK)
  apart, _ = trained(CLOCK, apart=True)
  assert len(apart) == LAYERS * len(stacked)
  for path, array in stacked.items():
    for layer in range(LAYERS):
      alone = apart[path.replace('layers', f'layers_{layer}')]
      # The same numbers; XLA may add them in another order.
      error = np.max(np.abs(alone)) * 1e-6
      np.testing.assert_allclose(array[layer], alone, rtol=1e-6, atol=error)


def test_the_released_clock_begins_with_clipped_steps():
  # Moments start empty and take in 1.1e6^-0.8 = 1 / 68,100 of a square, so an
  # update would be 261 times the gradient's sign; clipped, it is the sign.
  param, gradient = jnp.array([3.0, 4.0]), jnp.array([2e-5, -2e-5])
  optimizer = adafactor(lambda step: RATE, decay_initial_step=CLOCK)
  change, state = optimizer.update(gradient, optimizer.init(param), param)
  # The parameter's scale is sqrt((9 + 16) / 2).
  np.testing.assert_allclose(
    change, [-RATE * 12.5**0.5, RATE * 12.5**0.5], rtol=1e-6
  )
  # To the 0.2 % that 1 - decay is rounded by.
  root = np.sqrt(optax.tree_utils.tree_get(state, 'v')[''])
  np.testing.assert_allclose(2e-5 / root, 261, rtol=2e-3)


def test_the_clock_goes_on():
  # After 1,000 steps from 1,100,000, decay is that of 1,101,000 steps done.
  param = jnp.ones(3)
  late = adafactor(lambda step: RATE, decay_initial_step=CLOCK + 1000)
  state = late.init(param)
  early = adafactor(lambda step: RATE, decay_initial_step=CLOCK)
  same = optax.tree_utils.tree_set(state, count=jnp.int32(1000))
  one, _ = late.update(param, state, param)
  two, _ = early.update(param, same, param)
  np.testing.assert_array_equal(one, two)


def test_a_rate_is_asked_for_the_updates_done():
  optimizer = adafactor(lambda step: jnp.float32(step))
  param = jnp.ones(3)
  state = optimizer.init(param)
  for done in range(3):
    change, state = optimizer.update(param, state, param)
    np.testing.assert_allclose(change, -done * param, rtol=1e-6)


def moment_sizes(optimizer, path, shape):
  """Sizes of a layer's two factored moments; None where all are kept."""
  params = weight_mapping.unflatten(
    {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
  )
  (state,) = jax.eval_shape(optimizer.init, params).values()
  rows, columns, whole = (
    optax.tree_utils.tree_get(state, key)[path]
    for key in ('v_row', 'v_col', 'v')
  )
  layers = shape[0] if 'layers' in path.split('/') else 1
  # Optax has a single zero in the place of what it does not keep.
  if rows.size == columns.size == layers:
    assert whole.size == np.prod(shape)
    return None
  assert whole.size == layers
  return tuple(sorted((rows.size // layers, columns.size // layers)))


@pytest.mark.parametrize(
  ('path', 'shape', 'expected'),
  [
    # Matrices, of a layer or of the model; one side of 127 is too small.
    ('embed/embedding', (131, 137), (131, 137)),
    ('encoder/layers/mlp/wo/kernel', (3, 131, 137), (131, 137)),
    ('encoder/layers_2/mlp/wo/kernel', (131, 137), (131, 137)),
    ('encoder/layers/mlp/wo/kernel', (3, 127, 137), None),
    ('encoder/layers/mlp/wo/kernel', (131, 137, 127), None),
    # Heads times their size is one side.
    ('decoder/layers/cross/v/kernel', (3, 131, 2, 67), (131, 134)),
    ('decoder/layers/cross/o/kernel', (3, 2, 67, 131), (131, 134)),
    ('decoder/layers/cross/v/kernel', (3, 131, 2, 61), None),
    # LoRA's are matrices in T5X, factored at ranks that nobody uses.
    ('encoder/layers/self/o/lora/a', (3, 2, 67, 131), (131, 134)),
    ('encoder/layers/self/q/lora_2/b', (3, 131, 2, 67), (131, 134)),
    ('encoder/layers/self/q/lora/a', (3, 512, 16), None),
    # Arrays with experts beside a rank or heads are not, however large.
    ('encoder/layers/self/q/molora/a', (3, 512, 131, 131), None),
    ('encoder/layers/self/q/molora/b', (3, 131, 131, 131, 131), None),
    ('encoder/layers/self/k/mov/scale', (3, 131, 131, 131), None),
    ('encoder/layers/mlp/act/mov/scale', (3, 10, 1024), None),
    ('encoder/layers/self/q/molora/router/kernel', (3, 512, 10), None),
    ('encoder/layers/mlp/norm/scale', (3, 512), None),
    ('decoder/norm/scale', (512,), None),
  ],
)
def test_what_t5x_factors_is_factored(path, shape, expected):
  optimizer = adafactor(lambda step: RATE)
  assert moment_sizes(optimizer, path, shape) == expected
