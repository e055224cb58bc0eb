# SPDX-License-Identifier: Apache-2.0
"""Layers with unlike counts of experts train as layers of those counts do.

The reference is a model whose layers are not scanned and have each a mixture of
its own, without padding.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.core.types import Context
from moepeft.moe import aux_losses
from moepeft.moe.router_stats import collect
from moepeft.nn import expert_padding
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.nn.initializers import init_params, padded_axes
from moepeft.nn.linear import Linear
from moepeft.nn.scan_layers import scan_layers
from moepeft.peft import build
from moepeft.training.optimizers import make_optimizer

from ..contracts import small

# Sides of 128 are factored by Adafactor.
D = 128
SITES = {'proj': 'key'}


class Block(nn.Module):
  adapter_map: AdapterMap

  @nn.compact
  def __call__(self, x, ctx):
    proj = Linear(
      'btd,df->btf', (D, D), 'proj', self.adapter_map, 0.1, name='proj'
    )
    return x + jnp.tanh(proj(x, ctx))


class Stack(nn.Module):
  """Scanned layers of one map of adapters, or a layer for each of several."""

  adapter_maps: tuple[AdapterMap, ...]
  depth: int

  @nn.compact
  def __call__(self, batch):
    x, ctx = batch['inputs'], Context(train=False)
    if len(self.adapter_maps) == 1:
      block = Block(self.adapter_maps[0], parent=None)
      return scan_layers(block, self.depth, x, ctx)
    for i, adapter_map in enumerate(self.adapter_maps):
      x = Block(adapter_map, name=f'layers_{i}')(x, ctx)
    return x


def make(text, counts):
  return build(text.format(counts), SITES).adapter_map


def batches():
  rng = np.random.default_rng(3)
  shape = (5, 2, 7, D)
  return [
    {'inputs': x, 'targets': y}
    for x, y in zip(
      rng.standard_normal(shape, np.float32),
      rng.standard_normal(shape, np.float32),
      strict=True,
    )
  ]


def train(model, params, peft, optimizer):
  """(losses, the adapter after five steps)."""

  def loss(peft, batch):
    x, changed = model.apply(
      {'params': params, 'peft': peft}, batch, mutable=['routing']
    )
    sites = collect(changed['routing']).values()
    balance = [jnp.atleast_1d(aux_losses.load_balance(s)) for s in sites]
    balance = jnp.mean(jnp.concatenate(balance))
    return jnp.mean((x - batch['targets']) ** 2) + 0.1 * balance

  @jax.jit
  def step(peft, state, batch):
    value, gradient = jax.value_and_grad(loss)(peft, batch)
    updates, state = optimizer.update(gradient, state, peft)
    return jax.tree.map(jnp.add, peft, updates), state, value

  state, losses = jax.jit(optimizer.init)(peft), []
  for batch in batches():
    peft, state, value = step(peft, state, batch)
    losses.append(float(value))
  return losses, flatten(peft)


def flatten(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')


def unflatten(arrays):
  return flax.traverse_util.unflatten_dict(arrays, sep='/')


CASES = {
  'mixture(expert=lora(rank=3), {}, router=topk(k=2), reads=output)': (2, 5, 3),
  'mixture(expert=lora(rank=3), {}, share=b)': (1, 4, 2),
  # The scales of two layers, but not of the third, are factored.
  'mov({}, reads=output)': (128, 130, 3),
}


@pytest.mark.parametrize(
  ('text', 'name'),
  [
    *(
      pytest.param(
        text,
        'adamw',
        marks=pytest.mark.slow if text.startswith('mov') else (),
      )
      for text in CASES
    ),
    # With moments in factors, which the other cases have not.
    *(
      pytest.param(
        text,
        'adafactor',
        marks=() if text.startswith('mov') else pytest.mark.slow,
      )
      for text in CASES
    ),
  ],
)
def test_five_steps_equal_those_of_layers_with_their_own_counts(text, name):
  counts = CASES[text]
  padded_map = make(text, f'experts_per_layer={[*counts]}')
  model = Stack((padded_map,), len(counts))
  batch = {'inputs': batches()[0]['inputs']}
  variables = init_params(model, batch, 0)
  padded = padded_axes(model, batch)
  peft = {}
  for path, array in flatten(variables['peft']).items():
    rng = np.random.default_rng(len(path))
    array = array + 0.1 * rng.standard_normal(array.shape, np.float32)
    if path in padded:
      padded[path].clear_padding(array)
    peft[path] = array
  assert padded.keys() >= {p for p in peft if p.endswith('router/kernel')}

  config = config_lib.default().optimizer
  config.name, config.learning_rate = name, 0.02
  config.weight_decay, config.max_grad_norm = 0.1, 0.05
  # The second group sees no padding either.
  config.groups = '*/router/*: learning_rate=0.01'

  def split(arrays):
    # What experts share has no padding.
    shared = {path: a for path, a in arrays.items() if path not in padded}
    own = {path: a for path, a in arrays.items() if path in padded}
    return expert_padding.split(own, padded) | flatten(
      small.unstack(unflatten(shared))
    )

  losses, after = train(
    model,
    variables['params'],
    unflatten(peft),
    make_optimizer(config, 5, padded),
  )
  maps = tuple(make(text, f'experts={count}') for count in counts)
  reference = Stack(maps, len(counts))
  params = small.unstack(variables['params'])
  expected_losses, expected = train(
    reference, params, unflatten(split(peft)), make_optimizer(config, 5)
  )
  for path, axis in padded.items():
    cleared = np.array(after[path])
    axis.clear_padding(cleared)
    np.testing.assert_array_equal(after[path], cleared, err_msg=path)
  # Float32 sums over padding are in another order. AdamW divides the rounding
  # of a gradient that is near zero by its size: 2 % of a step's length.
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  actual = split(after)
  assert actual.keys() == expected.keys()
  atol = {'adamw': 2e-4, 'adafactor': 1e-5}[name]
  for path, array in expected.items():
    np.testing.assert_allclose(
      actual[path], array, rtol=1e-4, atol=atol, err_msg=path
    )
  if name == 'adafactor':
    # The test sees padding that an optimizer sees.
    _, other = train(
      model, variables['params'], unflatten(peft), make_optimizer(config, 5)
    )
    largest = max(np.abs(split(other)[p] - expected[p]).max() for p in expected)
    assert largest > 1e-3
