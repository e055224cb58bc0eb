# SPDX-License-Identifier: Apache-2.0
"""DoRA by hand: one output of two inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.nn.linear import base_projection
from moepeft.peft.methods.dora import Dora

EQN = 'btd,df->btf'
X = jnp.array([[[1.0, 2.0]]])
DORA = Dora(rank=1, alpha=2.0)


def call(kernel, a, b, magnitude, bias=None):
  bias = None if bias is None else jnp.array([bias])
  f = base_projection(EQN, jnp.array(kernel), jnp.float32, bias=bias)
  peft = {
    'a': jnp.array(a),
    'b': jnp.array([[b]]),
    'magnitude': jnp.array([magnitude]),
  }
  return DORA.apply({'peft': peft}, f, X, Context())[0, 0, 0]


def test_the_changed_weight_has_the_learned_magnitude():
  # W = (3, 4); alpha / r = 2, so 2 A B = (-3, 0) with B = -1.5: (0, 4) has
  # the norm 4, and 5 of its direction are (0, 5). x W' = 2 x 5.
  actual = call([[3.0], [4.0]], [[1.0], [0.0]], -1.5, 5.0)
  assert actual == pytest.approx(10.0)


def test_the_bias_is_left_alone():
  actual = call([[3.0], [4.0]], [[1.0], [0.0]], -1.5, 5.0, bias=7.0)
  assert actual == pytest.approx(17.0)


def test_the_norm_is_a_constant_to_the_gradient():
  # At B = 0, |W| = m = 5: dy/dB = m / |W| x (x A) x 2 = 2. Through the norm it
  # would be 5 d(x v / |v|) = 2 x (1 - 11 x 3 / 25) = -0.64.
  slope = jax.grad(lambda b: call([[3.0], [4.0]], [[1.0], [0.0]], b, 5.0))
  assert slope(0.0) == pytest.approx(2.0)
  # And dy/dm = x W / |W| = 11 / 5.
  slope = jax.grad(lambda m: call([[3.0], [4.0]], [[1.0], [0.0]], 0.0, m))
  assert slope(5.0) == pytest.approx(2.2)


def test_a_weight_of_zeros_stays_finite():
  def loss(b, m):
    return call([[0.0], [0.0]], [[1.0], [0.0]], b, m)

  value, slopes = jax.value_and_grad(loss, (0, 1))(0.0, 0.0)
  assert value == 0
  assert np.isfinite(slopes).all()
