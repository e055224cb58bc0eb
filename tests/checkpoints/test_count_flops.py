# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a token, by hand and as the compiled program has them."""

import jax
import jax.numpy as jnp
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_flops import (
  flops_per_token,
  loss_of_shapes,
  products,
)
from moepeft.checkpoints.solve_method import with_explicit_method

from .test_solve_method import config_of


def flops(method, **changes):
  config = config_of(method, **changes)
  config.batch_size, config.data.length = 2, 48
  return flops_per_token(config)


@pytest.mark.slow
def test_a_column_of_rank_adds_two_flops_a_number_and_four_backward():
  # 4 layers of 1,856 numbers (`test_solve_method`): a number is multiplied and
  # added once for a token; backward once for its gradient, once for that of
  # what it is multiplied with.
  less, more = flops('lora(rank=5)'), flops('lora(rank=6)')
  assert more['forward'] - less['forward'] == pytest.approx(2 * 7424)
  assert more['backward'] - less['backward'] == pytest.approx(4 * 7424)


# As wide as a small model, so that products are nearly all; one layer, since
# XLA counts the body of a scan once. The embedding is trained, so that all
# layers pass gradients on, as those of a scan do.
WIDE = {
  'model.shape.layers': 1,
  'model.shape.d_model': 512,
  'model.shape.ffn': 1024,
  'model.shape.heads': 4,
  'model.shape.kv_heads': 4,
  'model.shape.head_dim': 128,
  'model.shape.vocab': 1031,
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  [
    'lora(rank=16)',
    'molora(experts=5, rank=8)',
    'hydralora',
    'smear',
  ],
)
def test_products_are_the_flops_that_xla_counts(method):
  config = config_lib.default()
  config.model.path, config.model.family = '', 'llama'
  config.model.size = 'tiny'
  config.method = f"lora(rank=1, targets='embed') + {method}"
  with config.unlocked():
    config.update_from_flattened_dict(WIDE)
  config.batch_size, config.data.length = 2, 64
  loss, args, _ = loss_of_shapes(config, base_lib.shape(config.model))
  step = jax.value_and_grad(loss)
  compiled = jax.jit(step).lower(*args).compile().cost_analysis()['flops']
  # Activations, norms and softmaxes are an operation or some for a number that
  # a product of hundreds of pairs made.
  assert 1 <= compiled / products(step, *args) < 1.05


def test_a_scan_counts_as_often_as_it_runs_and_dead_products_do_not():
  x, w = jnp.zeros((5, 7)), jnp.zeros((3, 7, 7))

  def function(x, w):
    unread = x @ x.T
    return jax.lax.scan(lambda x, w: (x @ w, unread), x, w)[0]

  assert products(function, x, w) == 3 * 2 * 5 * 7 * 7


@pytest.mark.slow
def test_a_budget_of_flops_is_solved():
  changes = {'batch_size': 2, 'data.length': 48}
  config = config_of('molora(experts=3)', **changes)
  target = flops('molora(experts=3, rank=11)')
  config.budget = f'flops:{sum(target.values())}'
  assert with_explicit_method(config).method == 'molora(experts=3, rank=11)'
  # As many as full fine-tuning are more than a LoRA's of any small rank.
  config = config_of('lora', budget='flops:lora(rank=9)', **changes)
  assert with_explicit_method(config).method == 'lora(rank=9)'
