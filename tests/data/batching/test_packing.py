# SPDX-License-Identifier: Apache-2.0
"""Packed rows mean what their examples mean alone: losses and gradients.

In float64, where a packed row's other length and order of addition are no
excuse: it rounds at 1e-16, and a token that saw a neighbour would show at
1e-3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.models import weight_mapping
from moepeft.moe import aux_losses, router_stats
from moepeft.objectives.cross_entropy import (
  AVERAGE_OVER,
  CrossEntropySettings,
  mean_loss,
  token_losses,
)
from moepeft.objectives.seq2seq import loss_sums

from ...contracts import small

CLOSE = dict(rtol=1e-9, atol=1e-13)
# Tokens of inputs and targets of five examples, of which a row holds three
# and a row two, with padding at the ends.
LENGTHS = ((5, 3), (2, 7), (4, 1), (7, 2), (3, 5))
ROWS = ((0, 1, 2), (3, 4))
S, T = 13, 11
MOLORA = (
  'molora(experts=3, rank=2, '
  "targets='encoder/mlp/wo|decoder/self/q|decoder/cross/k')"
)
CASES = [
  (MOLORA, 'tokens'),
  pytest.param('mov(experts=3)', 'sequences', marks=pytest.mark.slow),
  *(
    pytest.param(method, per, marks=pytest.mark.slow)
    for method in small.ONE_EACH
    for per in AVERAGE_OVER
  ),
]


def examples():
  rng = np.random.default_rng(0)
  return [
    [rng.integers(2, small.GATED.vocab, n) for n in pair] for pair in LENGTHS
  ]


def pack(rows, s=S, t=T, found=None):
  """The batch whose rows hold the examples of these numbers."""
  found = found or examples()
  keys = ('inputs', 'targets', 'decoder_inputs')
  parts = ('segments', 'positions')
  sides = [f'{side}_{part}' for side in keys[:2] for part in parts]
  batch = {
    key: np.zeros((len(rows), s if key.startswith('inputs') else t), np.int32)
    for key in (*keys, *sides)
  }
  for i, row in enumerate(rows):
    at = dict.fromkeys(keys[:2], 0)
    for segment, number in enumerate(row, start=1):
      for side, ids in zip(keys[:2], found[number], strict=True):
        here = slice(at[side], at[side] + len(ids))
        at[side] += len(ids)
        batch[side][i, here] = ids
        batch[f'{side}_segments'][i, here] = segment
        batch[f'{side}_positions'][i, here] = np.arange(len(ids))
        if side == 'targets':
          # Shifted within the segment, whose first token sees 0.
          batch['decoder_inputs'][i, here] = [0, *ids[:-1]]
  for side in keys[:2]:
    batch[f'{side}_mask'] = batch[f'{side}_segments'] > 0
  return batch


def alone():
  """A row an example, without segments."""
  batch = pack([(i,) for i in range(len(LENGTHS))], 7, 7)
  extra = ('segments', 'positions')
  return {k: a for k, a in batch.items() if not k.endswith(extra)}


@functools.cache
def gradients(method, per, packed):
  """({path: gradient}, loss, aux, router losses) of the five examples."""
  model, _ = small.make(method, dtype=jnp.float64)
  # Kept for other tests, so made in float32.
  variables = jax.tree.map(np.asarray, small.variables(method, noise=0.1))
  with jax.enable_x64(True):
    variables = jax.tree.map(lambda a: jnp.asarray(a, 'float64'), variables)
    batch = pack(ROWS) if packed else alone()

    def loss(peft):
      total, aux = loss_sums(
        model.apply,
        {**variables, 'peft': peft},
        batch,
        None,
        CrossEntropySettings(
          average_over=per, z_loss=0.01, label_smoothing=0.1
        ),
      )
      weights = dict.fromkeys(aux_losses.LOSSES, 0.1)
      routed = aux_losses.auxiliary_loss(
        router_stats.collect(aux['routing']), weights
      )
      return mean_loss(total, aux) + routed, (
        mean_loss(total, aux),
        aux,
        routed,
      )

    actual, seen = jax.jit(jax.grad(loss, has_aux=True))(variables['peft'])
    return jax.tree.map(np.asarray, (weight_mapping.flatten(actual), *seen))


@pytest.mark.parametrize(('method', 'per'), CASES)
def test_packed_rows_have_the_losses_and_gradients_of_examples_alone(
  method, per
):
  actual, loss, aux, routed = gradients(method, per, packed=True)
  expected, loss_alone, aux_alone, routed_alone = gradients(method, per, False)
  np.testing.assert_allclose(loss, loss_alone, **CLOSE)
  # Router losses are of sums in float32 counts and float64 probabilities.
  np.testing.assert_allclose(routed, routed_alone, **CLOSE)
  for key in ('weight', 'tokens', 'correct'):
    assert aux[key] == aux_alone[key]
  assert aux['weight'] == {'tokens': 3 + 7 + 1 + 2 + 5, 'sequences': 5}[per]
  assert actual.keys() == expected.keys()
  for path, gradient in expected.items():
    assert np.abs(gradient).max() > 1e-8, path
    np.testing.assert_allclose(actual[path], gradient, err_msg=path, **CLOSE)


def test_an_example_does_not_move_its_neighbours_in_a_row():
  model, _ = small.make(MOLORA)
  variables = small.variables(MOLORA, noise=0.1)

  def costs(batch):
    return token_losses(model.apply(variables, batch), batch['targets'])

  before = pack(ROWS)
  changed = examples()
  # All tokens of the row's middle example, inputs and targets, are others.
  changed[1] = [(ids - 2 + 5) % 35 + 2 for ids in changed[1]]
  after = pack(ROWS, found=changed)
  other = before['targets_mask'] & ~(
    (before['targets_segments'] == 2) & (np.arange(2) == 0)[:, None]
  )
  one, two = jax.jit(costs)(before), jax.jit(costs)(after)
  # What is masked weighs exactly nothing.
  np.testing.assert_array_equal(one[other], two[other])
  assert (np.asarray(one != two) & ~other & before['targets_mask']).any()
