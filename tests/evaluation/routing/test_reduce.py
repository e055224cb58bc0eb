# SPDX-License-Identifier: Apache-2.0
"""Reduced adapters compute what the mixture computes, as far as they can."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from moepeft.evaluation.routing.reduce import (
  low_rank_mean,
  merge_to_lora,
  prune,
)
from moepeft.nn import initializers
from moepeft.peft.methods.lora import Lora

from ...contracts import small
from . import planted

LAYERS, E, R = 2, 3, 2
# Heads and their size; outputs.
IN, OUT = (3, 5), (7,)


def mixture(**fields):
  defaults = {
    'expert': Lora(R, alpha=6.0),
    'experts': E,
    'shared_experts': 0,
    'share': '',
    'ranks': (),
  }
  return types.SimpleNamespace(**(defaults | fields))


def normal(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape)


@pytest.mark.parametrize('share', ['', 'a', 'b'])
def test_a_lora_of_full_rank_is_the_weighted_sum(share):
  a = normal(LAYERS, *IN, *(() if share == 'a' else (E,)), R)
  b = normal(LAYERS, *(() if share == 'b' else (E,)), R, *OUT)
  p = np.abs(normal(LAYERS, E))
  left = 'lxyr' if share == 'a' else 'lxyer'
  right = 'lro' if share == 'b' else 'lero'
  # The scale is alpha / r = 3.
  expected = 3 * np.einsum(f'{left},{right},le->lxyo', a, b, p)
  low_a, low_b, lost = low_rank_mean(
    mixture(share=share), {'a': a, 'b': b}, p, E * R, True
  )
  assert low_a.shape == (LAYERS, *IN, E * R)
  actual = np.einsum('lxyr,lro->lxyo', low_a, low_b)
  # float32, of values up to 100.
  np.testing.assert_allclose(actual, expected, atol=1e-4)
  np.testing.assert_allclose(lost, 0, atol=1e-9)


def test_a_smaller_rank_leaves_out_the_smallest_singular_values():
  # Orthogonal changes of norms 4, 3 and 0.
  a = np.zeros((4, E, 1))
  b = np.zeros((E, 1, 4))
  a[0, 0] = a[1, 1] = a[2, 2] = 1
  b[0, 0, 0], b[1, 0, 1] = 4, 3
  ones = mixture(expert=Lora(1, alpha=1.0))
  low_a, low_b, lost = low_rank_mean(
    ones, {'a': a, 'b': b}, np.ones((1, E)), 1, False
  )
  np.testing.assert_allclose(low_a @ low_b, np.diag([4, 0, 0, 0]), atol=1e-6)
  # 3 / sqrt(4^2 + 3^2)
  np.testing.assert_allclose(lost, [0.6])


def test_experts_of_unlike_ranks_have_their_scales():
  a, b = normal(1, 15, E, R), normal(1, E, R, 7)
  ranks = (1, 2, 2)
  expected = 0
  for e, rank in enumerate(ranks):
    expected = expected + 6 / rank * a[0, :, e, :rank] @ b[0, e, :rank]
  low_a, low_b, _ = low_rank_mean(
    mixture(ranks=ranks), {'a': a, 'b': b}, np.ones((1, E)), E * R, True
  )
  np.testing.assert_allclose(low_a[0] @ low_b[0], expected, atol=1e-4)


@pytest.fixture(scope='module')
def moved():
  """(model, variables) of the planted model with experts that do something."""
  model, variables = planted.model()
  peft = small.moved(variables['peft'], 0.3, 3)
  return model, {**variables, 'peft': peft}


def logits(model, variables):
  batch = {k: np.asarray(v) for k, v in small.batch().items()}
  return np.asarray(jax.jit(model.apply)(variables, batch))


def evenly_routed(routing):
  """The routing with the weight 1/3 of all experts for every task."""
  return dataclasses.replace(
    routing,
    sites=tuple(
      dataclasses.replace(
        site, weight_by_task=np.full_like(site.weight_by_task, 1 / 3)
      )
      for site in routing.sites
    ),
  )


def test_an_even_mixture_is_one_lora(moved):
  model, variables = moved
  # A router of zeros weights all experts evenly, so that nothing is lost.
  even = jax.tree_util.tree_map_with_path(
    lambda path, a: a * 0 if 'router' in str(path) else a, variables['peft']
  )
  routing = evenly_routed(planted.collected())
  reduced = merge_to_lora(model.adapter_map, even, routing, 6)
  assert reduced.method == ("lora(rank=6, alpha=6.0, targets='encoder/self/q')")
  merged, _ = small.make(reduced.method, planted.CONFIG)
  np.testing.assert_allclose(
    logits(merged, {**variables, 'peft': reduced.peft}),
    logits(model, {**variables, 'peft': even}),
    # float32 after six layers; logits are up to 5.
    atol=1e-4,
  )


def test_a_task_s_lora_has_its_weights(moved):
  model, variables = moved
  routing = planted.collected()
  (site,) = routing.sites
  by_task = [
    merge_to_lora(model.adapter_map, variables['peft'], routing, 6, task)
    for task in 'ab'
  ]
  arrays = variables['peft']['encoder']['layers']['self']['q']['molora']
  for weights, reduced in zip(site.weight_by_task, by_task, strict=True):
    lora = reduced.peft['encoder']['layers']['self']['q']['lora']
    # The scale is alpha / r = 16 / 2.
    expected = 8 * np.einsum(
      'lder,lernh,le->ldnh', arrays['a'], arrays['b'], weights
    )
    actual = np.einsum('ldr,lrnh->ldnh', lora['a'], lora['b'])
    np.testing.assert_allclose(actual, expected, atol=1e-5)
  with pytest.raises(ValueError, match="tasks a, b; got 'c'"):
    merge_to_lora(model.adapter_map, variables['peft'], routing, 6, 'c')


def test_a_pruned_mixture_has_the_experts_of_largest_share(moved):
  model, variables = moved
  routing = planted.collected()
  # Expert 2 is the smallest of layer 0 and expert 0 of layer 1.
  share = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
  (site,) = routing.sites
  sites = (dataclasses.replace(site, share=share),)
  axes = initializers.logical_axes(model, small.batch())['peft']
  reduced = prune(
    planted.METHOD,
    model.adapter_map,
    variables['peft'],
    axes,
    dataclasses.replace(routing, sites=sites),
    2,
  )
  assert reduced.method == (
    "molora(experts=2, rank=2, targets='encoder/self/q')"
  )
  before, after = (
    jax.tree.map(np.asarray, tree['encoder']['layers']['self']['q']['molora'])
    for tree in (variables['peft'], reduced.peft)
  )
  for layer, kept in enumerate(([0, 1], [1, 2])):
    np.testing.assert_array_equal(
      after['a'][layer], before['a'][layer][:, kept]
    )
    np.testing.assert_array_equal(after['b'][layer], before['b'][layer][kept])
    np.testing.assert_array_equal(
      after['router']['kernel'][layer],
      before['router']['kernel'][layer][:, kept],
    )
  smaller, _ = small.make(reduced.method, planted.CONFIG)
  logits(smaller, {**variables, 'peft': reduced.peft})


def test_what_cannot_be_reduced_is_refused():
  routing = planted.collected()
  for method, message in (
    ('molora(experts=3, rank=2, share_router=True)', 'share routers'),
    ('mode(experts=3, rank=2)', 'by_column=True'),
    ('molora(experts=3, rank=2) + lora(rank=1)', 'one mixture alone'),
  ):
    _, built = small.make(method)
    with pytest.raises(ValueError, match=message):
      merge_to_lora(built.adapter_map, {}, routing, 2)
  _, built = small.make('molora(experts=3, rank=2)')
  with pytest.raises(ValueError, match='no plain LoRAs'):
    merge_to_lora(built.adapter_map, {}, routing, 2)
  with pytest.raises(ValueError, match='has 3 experts; got 3'):
    prune('', built.adapter_map, {}, {}, routing, 3)
  _, built = small.make('molora(experts=3, rank=2, shared_experts=1)')
  with pytest.raises(ValueError, match='has shared_experts'):
    prune('', built.adapter_map, {}, {}, routing, 2)
