# SPDX-License-Identifier: Apache-2.0
"""Routing by an earlier pass: each layer its own part, or its own head.

The first pass computes the base model, since no expert has weight; a head on
its last hidden states gives each token's weights in every layer of the second.
`TwoPass` does so around a model, which takes a Routing of all layers; in X-LoRA
as a method, each site has the part of the head that is for it. Axes: b 3, t 11,
d 13; 3 layers, e 3 experts of rank 2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepeft.core.types import Routing, State
from moepeft.models.decoder.model import Decoder, sites
from moepeft.models.sites import context
from moepeft.models.t5 import model as t5
from moepeft.nn.numerics import softmax
from moepeft.objectives.objective import Objective
from moepeft.objectives.seq2seq import loss_sums
from moepeft.peft import build
from moepeft.training.step import make_train_step

from . import small, small_decoders
from .small_decoders import CONFIGS, make, place

AT = "targets='*/wo'"
METHOD = f'mixture(expert=lora(rank=2), experts=3, router=uniform, {AT})'
EXPERTS = 3
CONFIG = CONFIGS['gemma2']
# Float32 sums of a few tens of numbers, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)


@dataclasses.dataclass(frozen=True)
class TwoPass:
  """X-LoRA (Buehler & Buehler, arXiv:2402.07148) around a decoder.

  The head is `peft/scaling_head`, [d, l, e].
  """

  model: Decoder

  def routing(self, variables, ids, ctx):
    """(Routing [l, b, t, e], cache) of the first pass."""
    shape = (self.model.config.layers, *ids.shape, EXPERTS)
    none = Routing(jnp.zeros(shape), jnp.zeros(shape))
    states, collections = self.model.apply(
      variables,
      ids,
      ctx.replace(routing=none),
      method='states',
      mutable=['cache'],
    )
    head = variables['peft']['scaling_head']
    logits = jnp.einsum('btd,dle->lbte', states, head)
    return Routing(logits, softmax(logits)), collections

  def apply(self, variables, batch, train=False, rngs=None, mutable=False):
    """As of the decoder, with the routing of the first pass."""
    ids = batch['inputs']
    ctx = context(batch, 'inputs', ids, train=False)
    routing, _ = self.routing(variables, ids, ctx)
    return self.model.apply(
      variables, batch, train, routing, rngs=rngs, mutable=mutable
    )

  def extend(self, variables, caches, ids, ctx):
    """(logits, caches of both passes) of ids after what the caches hold."""
    first, second = caches
    routing, first = self.routing(variables | first, ids, ctx)
    logits, second = self.model.apply(
      variables | second,
      ids,
      ctx.replace(routing=routing),
      method='extend',
      mutable=['cache'],
    )
    return logits, (first, second)


def two_pass(**options):
  """(TwoPass, variables) with experts and a head that all matter."""
  model, variables = make(CONFIG, METHOD, 0.3, **options)
  shape = (CONFIG.d_model, CONFIG.layers, EXPERTS)
  head = np.random.default_rng(5).normal(size=shape).astype(np.float32)
  peft = variables['peft'] | {'scaling_head': jnp.asarray(head)}
  return TwoPass(model), variables | {'peft': peft}


def logits_of(pair, variables, batch=None):
  return np.asarray(
    small.jitted(pair)(variables, batch or small_decoders.batch())
  )


def test_each_layer_takes_its_own_part():
  model, variables = make(CONFIG, METHOD, 0.3)
  # Layer l has expert (l + 1) % 3 alone.
  chosen = np.array([1, 2, 0])
  weights = jnp.eye(3)[chosen][:, None, None]
  weights = jnp.broadcast_to(weights, (3, 3, 11, 3))
  actual = jax.jit(model.apply)(
    variables, small_decoders.batch(), routing=Routing(weights, weights)
  )

  def pick(path, leaf):
    # a [l, *in, e, r], b [l, e, r, *out]; gemma2's have one of each feature.
    at = leaf.ndim - 2 if path[-1].key == 'a' else 1
    parts = [jnp.take(leaf[i], e, axis=at - 1) for i, e in enumerate(chosen)]
    return jnp.stack(parts)

  def renamed(tree):
    return {
      'lora' if key == 'mixture' else key: renamed(value)
      if isinstance(value, dict)
      else value
      for key, value in tree.items()
    }

  peft = jax.tree_util.tree_map_with_path(pick, variables['peft'])
  alone, _ = make(CONFIG, f'lora(rank=2, {AT})')
  expected = small.jitted(alone)(
    variables | {'peft': renamed(peft)}, small_decoders.batch()
  )
  np.testing.assert_allclose(actual, expected, **CLOSE)
  base = small.jitted(Decoder(CONFIG))(
    {'params': variables['params']}, small_decoders.batch()
  )
  assert np.abs(actual - base).max() > 0.01


def test_the_first_pass_is_the_base():
  pair, variables = two_pass()
  batch = small_decoders.batch()
  ctx = context(batch, 'inputs', batch['inputs'], train=False)
  routing, _ = jax.jit(pair.routing)(variables, batch['inputs'], ctx)
  states_of = functools.partial(Decoder(CONFIG).apply, method='states')
  states = jax.jit(states_of)(
    {'params': variables['params']}, batch['inputs'], ctx
  )
  head = variables['peft']['scaling_head']
  expected = np.einsum('btd,dle->lbte', states, head)
  np.testing.assert_allclose(routing.logits, expected, **CLOSE)
  # Layers and tokens differ, so that the other tests see which they get.
  assert np.std(routing.combine_weights, axis=0).max() > 0.1
  assert np.std(routing.combine_weights, axis=2).max() > 0.1


def test_a_token_is_routed_by_its_prefix_alone():
  pair, variables = two_pass()
  batch = small_decoders.batch()
  before = logits_of(pair, variables)
  changed = batch['inputs'].at[:, 4:].add(1) % 37
  after = logits_of(pair, variables, batch | {'inputs': changed})
  np.testing.assert_allclose(after[:, :4], before[:, :4], **CLOSE)
  assert np.abs(after[0, 4:] - before[0, 4:]).max() > 0.01


def test_cached_decoding_equals_uncached():
  pair, variables = two_pass()
  ids = small_decoders.batch()['inputs']
  extend = jax.jit(pair.extend)
  logits, caches = [], ({}, {})
  # A prompt of 5 tokens, then one by one.
  for start, end in ((0, 5), *((i, i + 1) for i in range(5, 11))):
    positions = jnp.broadcast_to(jnp.arange(start, end), (3, end - start))
    actual, caches = extend(
      variables, caches, ids[:, start:end], place(positions, 13)
    )
    logits.append(actual)
  real = np.asarray(small_decoders.batch()['inputs_mask'])
  np.testing.assert_allclose(
    np.concatenate(logits, axis=1)[real],
    logits_of(pair, variables)[real],
    **CLOSE,
  )


def rows():
  batch = small_decoders.batch()
  targets = jnp.roll(batch['inputs'], -1, axis=1)
  return batch | {'targets': targets, 'targets_mask': batch['inputs_mask']}


def test_scan_equals_loop():
  pair, variables = two_pass()
  loop, _ = two_pass(scan=False)
  np.testing.assert_allclose(
    logits_of(loop, small.unstack(variables)),
    logits_of(pair, variables),
    **CLOSE,
  )


def test_it_trains_and_neither_parts_nor_remat_change_that():
  built = build(METHOD, sites(CONFIG))
  optimizer = optax.adam(0.01)

  def train(steps, parts=1, **options):
    pair, variables = two_pass(**options)
    state = State(
      jnp.int32(0),
      variables['peft'],
      variables['params'],
      optimizer.init(variables['peft']),
      jax.random.key(0),
    )
    step = jax.jit(
      make_train_step(
        pair,
        built,
        Objective(loss_sums),
        optimizer,
        {'z': 0.01},
        accumulate=parts,
      )
    )
    losses = []
    for _ in range(steps):
      state, metrics = step(state, rows())
      losses.append(float(metrics['loss']))
    moved = jax.tree.map(np.subtract, state.trainable, variables['peft'])
    return losses, moved

  losses, moved = train(10)
  assert losses[-1] < losses[0] - 0.1
  # The head's every number, by a loss that only the second pass has.
  assert np.abs(moved['scaling_head']).min() > 1e-4
  again, _ = train(3, parts=3, remat='full')
  np.testing.assert_allclose(again, losses[:3], rtol=1e-5)


def test_a_routing_of_another_shape_is_refused():
  model, variables = make(CONFIG, METHOD)
  weights = jnp.ones((2, 3, 11, 3))
  with pytest.raises(
    ValueError, match=r'experts\) = \(3, 3, 11, e\); got \(2, 3, 11, 3\)'
  ):
    model.apply(
      variables, small_decoders.batch(), routing=Routing(weights, weights)
    )


XLORA = small_decoders.METHODS[0]


def test_xlora_routes_by_the_base_s_last_hidden_states():
  model, variables = make(CONFIG, XLORA, 0.3)
  batch = small_decoders.batch()
  run = functools.partial(model.apply, mutable=['weights'])
  _, updates = jax.jit(run)(variables, batch)
  ctx = context(batch, 'inputs', batch['inputs'], train=False)
  states_of = functools.partial(Decoder(CONFIG).apply, method='states')
  states = jax.jit(states_of)(
    {'params': variables['params']}, batch['inputs'], ctx
  )
  site = variables['peft']['decoder']['layers']['self']['v']
  router = site['xlora']['router']
  logits = np.einsum('btd,lde->lbte', states, router['kernel'])
  logits += np.asarray(router['bias'])[:, None, None]
  weights = updates['weights']['decoder']['layers']['self']['v']['xlora']
  np.testing.assert_allclose(weights['weights'][0], softmax(logits), **CLOSE)


def test_xlora_starts_at_the_base_and_routes_a_token_by_its_prefix():
  model, variables = make(CONFIG, XLORA, 0.3)
  batch = small_decoders.batch()
  before = logits_of(model, variables)
  changed = batch['inputs'].at[:, 4:].add(1) % 37
  after = logits_of(model, variables, batch | {'inputs': changed})
  np.testing.assert_allclose(after[:, :4], before[:, :4], **CLOSE)
  assert np.abs(after[0, 4:] - before[0, 4:]).max() > 0.01
  _, fresh = make(CONFIG, XLORA)
  base = small.jitted(Decoder(CONFIG))(
    {'params': variables['params']}, small_decoders.batch()
  )
  np.testing.assert_allclose(logits_of(model, fresh), base, **CLOSE)
  loop, _ = make(CONFIG, XLORA, 0.3, scan=False)
  np.testing.assert_allclose(
    logits_of(loop, small.unstack(variables)), before, **CLOSE
  )


@pytest.mark.slow
def test_xlora_trains_and_neither_parts_nor_remat_change_that():
  built = build(XLORA, sites(CONFIG))
  optimizer = optax.adam(0.01)

  def train(steps, parts=1, **options):
    model, variables = make(CONFIG, XLORA, 0.3, **options)
    state = State(
      jnp.int32(0),
      variables['peft'],
      variables['params'],
      optimizer.init(variables['peft']),
      jax.random.key(0),
    )
    step = jax.jit(
      make_train_step(
        model,
        built,
        Objective(loss_sums),
        optimizer,
        {'z': 0.01},
        accumulate=parts,
      )
    )
    losses = []
    for _ in range(steps):
      state, metrics = step(state, rows())
      losses.append(float(metrics['loss']))
    return losses

  losses = train(10)
  assert losses[-1] < losses[0] - 0.1
  np.testing.assert_allclose(
    train(3, parts=3, remat='full'), losses[:3], rtol=1e-5
  )


def test_xlora_needs_a_decoder_only_model():
  with pytest.raises(ValueError, match='by a first pass of a decoder-only mod'):
    build('xlora', t5.sites(small.GATED))
