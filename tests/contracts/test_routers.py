# SPDX-License-Identifier: Apache-2.0
"""Contracts of every router, and losses and statistics by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context, Routing
from moepeft.models.decoder import model as decoder
from moepeft.moe import ROUTERS, aux_losses, router_state, router_stats
from moepeft.moe.gate import INIT, gate_logits
from moepeft.moe.routers.softmax import Softmax
from moepeft.moe.routers.topk import TopK
from moepeft.nn.initializers import peft_param
from moepeft.peft import build
from moepeft.peft.method import options_of

from . import small_decoders
from .router_cases import OPTIONS, context, crossed, make

# As many features as 3, 4 and 7 experts can have alike.
X = jax.random.normal(jax.random.key(0), (2, 5, 84))
# A prompt of three tokens; the rows are of two tasks.
CTX = context(2, 5)


def init(router, x=X, ctx=CTX, seed=1):
  rngs = {'peft': jax.random.key(seed), 'router': jax.random.key(3)}
  return compiled(router)(rngs, x, ctx)


def run(router, x=X, ctx=CTX, seed=1):
  return init(router, x, ctx, seed)[0]


def parameters(router):
  return init(router)[1].get('peft', {})


@functools.cache
def compiled(router):
  return jax.jit(router.init_with_output)


@pytest.mark.parametrize('name', ROUTERS)
def test_rows_sum_to_one_where_the_entry_says_so(name):
  routing = run(make(name))
  assert routing.combine_weights.shape == (2, 5, 3)
  total = np.asarray(jnp.sum(routing.combine_weights, -1))
  if ROUTERS[name].normalized:
    # float32 softmax.
    np.testing.assert_allclose(total, 1, rtol=1e-6)
  else:
    assert (np.abs(total - 1) > 1e-3).all()


def test_topk_sums_to_its_largest_probabilities_or_to_one():
  total = jnp.sum(run(TopK(3)).combine_weights, -1)
  assert (total < 1).all() and (total >= 1 / 3).all()
  renormalized = jnp.sum(run(TopK(3, renormalize=True)).combine_weights, -1)
  np.testing.assert_allclose(renormalized, 1, rtol=1e-6)


@pytest.mark.parametrize('name', ROUTERS)
def test_routers_have_parameters_where_the_entry_says_so(name):
  router = make(name)
  frozen = getattr(router, 'frozen_arrays', ())
  trained, _ = router_state.split({'router': parameters(router)}, frozen)
  assert bool(jax.tree.leaves(trained)) == ROUTERS[name].learned


@pytest.mark.parametrize('name', [n for n, r in ROUTERS.items() if r.learned])
def test_every_trained_parameter_has_a_gradient(name):
  router = make(name)
  trained, state = router_state.split(parameters(router))
  # Noise kernels are trained in training only.
  ctx = CTX.replace(train=True)

  def loss(trained):
    weights = router.apply(
      {'peft': router_state.join(trained, state)},
      X,
      ctx,
      rngs={'router': jax.random.key(3)},
    ).combine_weights
    return jnp.sum(weights * jnp.arange(3.0))

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(trained)):
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize('name', ROUTERS)
def test_a_row_is_routed_by_itself_where_the_entry_says_so(name):
  router = make(name)
  other = run(router, X.at[1].set(9.0)).combine_weights[0]
  equal = np.array_equal(run(router).combine_weights[0], other)
  assert equal == ROUTERS[name].independent_of_batch


class BatchMean(nn.Module):
  """One routing for a whole batch, as peft's Lily averages its router's."""

  experts: int = 3

  @nn.compact
  def __call__(self, x, ctx):
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    logits = gate_logits(x, kernel)
    mean = jnp.mean(jax.nn.softmax(logits), axis=(0, 1))
    return Routing(logits, jnp.broadcast_to(mean, logits.shape))


def test_the_contracts_fail_for_a_routing_of_the_whole_batch():
  # No row is routed by itself, and no token by those before it.
  weights = run(BatchMean()).combine_weights
  other_row = run(BatchMean(), X.at[1].set(9.0)).combine_weights
  later = run(BatchMean(), X.at[:, 3:].set(9.0)).combine_weights
  assert not np.array_equal(weights[0], other_row[0])
  assert not np.array_equal(weights[:, :3], later[:, :3])


@pytest.mark.parametrize('name', crossed('softmax', 'sentence', 'magnitude'))
def test_routers_are_float32_inside(name):
  routing = run(make(name), X.astype(jnp.bfloat16))
  assert routing.combine_weights.dtype == routing.logits.dtype == jnp.float32


@pytest.mark.parametrize('name', ROUTERS)
def test_routers_are_causal_where_the_entry_says_so(name):
  later = X.at[:, 3:].set(9.0)
  router = make(name)
  equal = np.array_equal(
    run(router).combine_weights[:, :3],
    run(router, later).combine_weights[:, :3],
  )
  assert equal == ROUTERS[name].causal


@pytest.mark.parametrize('name', ROUTERS)
def test_a_decoder_takes_causal_routers_alone(name):
  options = OPTIONS.get(name, {})
  given = ', '.join(
    f'{k}={list(v) if isinstance(v, tuple) else v!r}'
    for k, v in options.items()
  )
  text = f'mixture(expert=lora, experts=3, router={name}({given}))'
  sites = decoder.sites(small_decoders.CONFIGS['llama'])
  if ROUTERS[name].causal:
    assert build(text, sites).adapter_map.entries
  else:
    with pytest.raises(ValueError, match='reads later tokens'):
      build(text, sites)


@pytest.mark.parametrize('name', ROUTERS)
def test_routers_read_the_whole_prompt_where_the_entry_says_so(name):
  entry = ROUTERS[name]
  if not entry.causal:
    return
  router = make(name)
  # The last token of the prompt.
  other = run(router, X.at[:, 2].set(9.0)).combine_weights[:, :2]
  equal = np.array_equal(run(router).combine_weights[:, :2], other)
  assert equal != entry.pools_prompt


@pytest.mark.parametrize('name', crossed('softmax', 'sentence', 'relu'))
def test_heads_have_weights_of_their_own_shape(name):
  heads = jnp.stack([X, X[..., ::-1]], axis=2)
  weights = run(make(name), heads).combine_weights
  assert weights.shape == (2, 5, 2, 3)
  # Both heads are routed as they would be alone, by the same parameters.
  for head in range(2):
    np.testing.assert_allclose(
      weights[:, :, head],
      run(make(name), heads[:, :, head]).combine_weights,
      rtol=1e-5,
      # A gate of ReLU may be near zero: the rounding is that of its logits.
      atol=1e-6,
    )


@pytest.mark.parametrize('name', ROUTERS)
def test_a_packed_example_is_routed_as_alone(name):
  """Examples of 3 and 2 tokens in one row, and padding behind them."""
  ids = np.array([[1, 1, 1, 2, 2, 0, 0]])
  prompt = np.array([[1, 1, 0, 1, 0, 0, 0]], bool)
  tasks = np.array([[1, 1, 1, 2, 2, 0, 0]])
  tokens = np.arange(7)[None]
  x = np.array(jax.random.normal(jax.random.key(7), (1, 7, 84)))
  router = make(name)

  def weights(x, ids, prompt, tasks, tokens):
    ctx = Context(
      token_mask=ids > 0,
      segment_ids=ids,
      prompt_mask=prompt,
      task_ids=tasks,
      token_ids=tokens,
    )
    return run(router, x, ctx).combine_weights

  row = x, ids, prompt, tasks, tokens
  packed = weights(*row)
  for start, stop in ((0, 3), (3, 5)):
    # The example at the front of a row of padding.
    alone = [np.zeros_like(a) for a in row]
    for part, whole in zip(alone, row, strict=True):
      part[:, : stop - start] = whole[:, start:stop]
    alone[1] = np.minimum(alone[1], 1)
    np.testing.assert_allclose(
      packed[:, start:stop],
      weights(*alone)[:, : stop - start],
      # Sums over the prompt, in another order.
      rtol=1e-5,
    )


@pytest.mark.parametrize('name', ROUTERS)
def test_padding_never_moves_a_real_token(name):
  mask = jnp.arange(5)[None] < jnp.array([[5], [3]])
  ctx = CTX.replace(token_mask=mask)
  router = make(name)
  other = jnp.where(mask[..., None], X, 100.0)
  expected = run(router, X, ctx).combine_weights[mask]
  np.testing.assert_array_equal(
    run(router, other, ctx).combine_weights[mask], expected
  )


def noises():
  """(router, option of noise); one of each option is fast."""
  fast = {}
  for name, entry in ROUTERS.items():
    for option, declared in options_of(entry.module).items():
      # Noise is off by default; other options of training begin elsewhere, but
      # for one of a loss.
      if declared.training_only and declared.default == 0 and option != 'delta':
        first = fast.setdefault(option, name) == name
        marks = () if first else pytest.mark.slow
        yield pytest.param(name, option, marks=marks)


@pytest.mark.parametrize(('name', 'noise'), noises())
def test_noise_acts_in_training_only(name, noise):
  # A capacity is in tokens, all others are rates: large ones, as a router of
  # sentences draws for two alone.
  value = 1 if noise == 'capacity' else 0.9
  quiet, noisy = make(name), make(name, **{noise: value})
  np.testing.assert_array_equal(
    run(quiet).combine_weights, run(noisy).combine_weights
  )
  train = CTX.replace(train=True)
  assert (
    np.abs(
      run(quiet).combine_weights - run(noisy, ctx=train).combine_weights
    ).max()
    > 1e-3
  )


@pytest.mark.parametrize('name', ROUTERS)
def test_experts_that_a_layer_does_not_have_get_no_weight(name):
  ctx = CTX.replace(expert_mask=jnp.array([True, True, False, False]))
  # Two experts that each take half of the tokens may leave one without.
  every = {'capacity_factor': 2.0} if name == 'expert_choice' else {}
  routing = run(make(name, 4, **every), ctx=ctx)
  weights = np.asarray(routing.combine_weights)
  np.testing.assert_array_equal(weights[..., 2:], 0)
  covered = (weights[..., :2].sum(-1) > 0).all()
  assert covered == ROUTERS[name].covers_tokens
  np.testing.assert_array_equal(routing.logits[..., 2:], -np.inf)


def test_expert_dropout_keeps_the_best_expert_and_the_sum():
  routing = run(Softmax(4, dropout=0.9), ctx=CTX.replace(train=True))
  best = jnp.argmax(routing.logits, -1)
  np.testing.assert_array_equal(jnp.argmax(routing.combine_weights, -1), best)
  np.testing.assert_allclose(jnp.sum(routing.combine_weights, -1), 1, rtol=1e-6)
  # Each of the three others is dropped with probability 0.9.
  assert 0.8 < float(jnp.mean(routing.combine_weights == 0)) / 0.75 < 1.0


def test_topk_keeps_the_k_most_probable_as_they_are():
  soft, top = run(Softmax(4)).combine_weights, run(TopK(4, k=2)).combine_weights
  remaining = np.sort(np.asarray(soft), -1)[..., 2:]
  np.testing.assert_allclose(np.sort(np.asarray(top), -1)[..., 2:], remaining)
  assert (np.sum(np.asarray(top) > 0, -1) == 2).all()


def test_random_depends_on_layer_and_site_alone():
  router = ROUTERS['random'].module(experts=5)
  first = run(router, ctx=CTX.replace(layer=jnp.int32(0))).combine_weights
  again = run(
    router, ctx=CTX.replace(layer=jnp.int32(0)), seed=2
  ).combine_weights
  other = run(router, ctx=CTX.replace(layer=jnp.int32(1))).combine_weights
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_a_k_beyond_the_experts_is_an_error():
  with pytest.raises(ValueError, match='k=4 of 3'):
    run(TopK(3, k=4))


sums_of = jax.jit(router_stats.router_stats)


def by_hand():
  """Three real tokens and one of padding over two experts.

  Probabilities of expert 0: 3/4, 3/4, 1/4 (and padding, which is 1/2), from
  logits (ln 3, 0), (ln 3, 0), (0, ln 3).
  """
  ln3 = np.log(3)
  logits = jnp.array([[[ln3, 0], [ln3, 0], [0, ln3], [0, 0]]], jnp.float32)
  mask = jnp.array([[True, True, True, False]])
  return sums_of(Routing(logits, jax.nn.softmax(logits)), mask)


def test_sums_are_over_real_tokens():
  sums = by_hand()
  assert float(sums.count) == 3
  np.testing.assert_allclose(sums.load, [2, 1])
  # 3/4 + 3/4 + 1/4 and 1/4 + 1/4 + 3/4
  np.testing.assert_allclose(sums.probability, [1.75, 1.25], rtol=1e-6)
  # Each token: 3/4 ln 4/3 + 1/4 ln 4
  entropy = 3 * (0.75 * np.log(4 / 3) + 0.25 * np.log(4))
  np.testing.assert_allclose(sums.entropy, entropy, rtol=1e-6)
  # log(3 + 1) for each.
  np.testing.assert_allclose(sums.log_z2, 3 * np.log(4) ** 2, rtol=1e-6)


def test_losses_by_hand():
  sums = by_hand()
  # 2 (2/3 * 1.75/3 + 1/3 * 1.25/3) = 2 (3.5 + 1.25) / 9
  np.testing.assert_allclose(aux_losses.load_balance(sums), 9.5 / 9, rtol=1e-6)
  np.testing.assert_allclose(
    aux_losses.router_z_loss(sums), np.log(4) ** 2, rtol=1e-6
  )
  total = aux_losses.auxiliary_loss(
    {'a': sums, 'b': sums}, {'load_balance': 2.0, 'z': 0.0}
  )
  np.testing.assert_allclose(total, 19 / 9, rtol=1e-6)


def test_statistics_by_hand():
  values = router_stats.statistics(by_hand())
  # A softmax gives every expert weight: the mean of (3/4, 3/4, 1/4) is 7/12,
  # though expert 0 has the largest weight of two tokens of three.
  np.testing.assert_allclose(values.share, [7 / 12, 5 / 12], rtol=1e-6)
  np.testing.assert_allclose(values.top, 7 / 12, rtol=1e-6)
  # Standard deviation 1/12 over mean 1/2.
  np.testing.assert_allclose(values.variation, 1 / 6, rtol=1e-5)
  np.testing.assert_allclose(values.weight_entropy, values.entropy, rtol=1e-6)
  assert not values.sparse


def direct(weights, logits, mask):
  """(mean weight, token share, entropies) in float64, a token at a time."""
  tokens = [(w, z) for w, z, m in zip(weights, logits, mask, strict=True) if m]
  # A token may have no expert.
  mixed = [w / (w.sum() or 1) for w, _ in tokens]
  nats = [-sum(p * np.log(p) for p in w if p > 0) for w in mixed]
  soft = [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for _, z in tokens]
  before = [-sum(p * np.log(p) for p in s) for s in soft]
  share = [(w > 0).astype(float) for w, _ in tokens]
  return tuple(np.mean(a, axis=0) for a in (mixed, share, nats, before))


@pytest.mark.parametrize('name', crossed('softmax', 'topk', 'threshold'))
def test_shares_and_entropies_equal_a_direct_form(name):
  mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], bool)
  routing = run(make(name, 7))
  values = router_stats.statistics(sums_of(routing, jnp.asarray(mask)))
  flat = lambda a: np.asarray(a, np.float64).reshape(-1, 7)  # noqa: E731
  weight, share, nats, before = direct(
    flat(routing.combine_weights), flat(routing.logits), mask.ravel()
  )
  # A router that leaves experts without weight is sparse, and no other.
  assert values.sparse == bool((flat(routing.combine_weights) == 0).any())
  expected = share if values.sparse else weight
  np.testing.assert_allclose(values.share, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(values.weight_entropy, nats, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(values.entropy, before, rtol=1e-5)


def test_a_token_of_top_k_counts_for_each_of_its_experts():
  values = router_stats.statistics(sums_of(run(TopK(5, k=2)), None))
  np.testing.assert_allclose(jnp.sum(values.share), 2, rtol=1e-6)
  # Every token goes to expert 0 and one other: all of the tokens, not half.
  weights = jnp.array([[[0.6, 0.4, 0], [0.6, 0, 0.4]]], jnp.float32)
  shared = Routing(jnp.log(weights + 1e-9), weights, k=2)
  values = router_stats.statistics(sums_of(shared, None))
  np.testing.assert_allclose(values.share, [1, 0.5, 0.5])


@pytest.mark.parametrize(
  'router',
  [Softmax(4, dropout=0.9), ROUTERS['uniform'].module(experts=4), TopK(4, k=4)],
  ids=str,
)
def test_expert_dropout_makes_no_dense_router_sparse(router):
  routing = run(router, ctx=CTX.replace(train=True))
  assert not routing.sparse


def test_equal_weights_share_the_load():
  routing = run(ROUTERS['uniform'].module(experts=3))
  np.testing.assert_allclose(
    sums_of(routing, None).load, [10 / 3] * 3, rtol=1e-6
  )


def test_sums_add_up_over_parts_of_a_batch():
  routing = run(TopK(3, k=2))
  whole = sums_of(routing, CTX.token_mask)
  halves = [
    sums_of(
      jax.tree.map(lambda a, i=i: a[i : i + 1], routing),
      CTX.token_mask[i : i + 1],
    )
    for i in range(2)
  ]
  added = jax.tree.map(jnp.add, *halves)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), added, whole
  )


def test_the_load_balance_loss_pushes_towards_balance():
  def loss(logits):
    routing = Routing(logits, jax.nn.softmax(logits))
    return aux_losses.load_balance(router_stats.router_stats(routing, None))

  slope = jax.jit(jax.grad(loss))(jnp.array([[[1.0, 0.0], [2.0, 0.0]]]))
  # Expert 0 has all the load: its logits must fall.
  assert (slope[..., 0] > 0).all() and (slope[..., 1] < 0).all()


def test_an_unknown_loss_is_named():
  with pytest.raises(ValueError, match='got config.router_losses.balance'):
    aux_losses.auxiliary_loss({}, {'balance': 1.0})
