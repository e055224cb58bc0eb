# SPDX-License-Identifier: Apache-2.0
"""Collected routing is what routers set by hand, and their sums, say."""

import dataclasses

import jax
import numpy as np
import pytest

from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.batching.decoder_only import CausalCollator, make_sample
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation.routing import plots
from moepeft.evaluation.routing.collect import check_has_router, collect
from moepeft.evaluation.routing.rows import LabeledRow
from moepeft.evaluation.routing.site_routing import SiteRouting
from moepeft.evaluation.routing.sown_weights import site_weights
from moepeft.moe import router_stats
from moepeft.runs.history import History

from ...contracts import small, small_decoders
from . import planted

# Two rows of 3 inputs and 2 targets.
SIDES = {
  'inputs': (np.zeros((2, 3), int), np.ones((2, 3), bool)),
  'targets': (np.zeros((2, 2), int), np.ones((2, 2), bool)),
}


def at(path, *calls):
  """The collection 'weights' with the calls of one site."""
  tree = {'weights': tuple(np.asarray(call, np.float32) for call in calls)}
  for part in reversed(path.split('/')):
    tree = {part: tree}
  return tree


def site(share, by_task, counts=(2, 2)):
  return SiteRouting(
    path='encoder/layers/self/q/molora',
    name='encoder/self/q',
    reads='inputs',
    counts=counts,
    identity_experts=0,
    share=np.array(share, float),
    by_task=np.array(by_task, float),
    by_language=np.zeros((0, 2, 2)),
    weight_by_task=np.array(by_task, float),
    token_ids=np.zeros(0, int),
    token_counts=np.zeros(0, int),
    by_token=np.zeros((0, 2, 2)),
  )


def test_weights_of_heads_are_normalized_and_averaged():
  # One layer; heads with the weights (1, 3) and (2, 0): (1/4, 3/4) and (1, 0),
  # on average (5/8, 3/8).
  weights = np.broadcast_to([[1.0, 3.0], [2.0, 0.0]], (1, 2, 3, 2, 2))
  path = 'encoder/layers/self/k/mov'
  (routed,) = site_weights(at(path, weights), SIDES).values()
  assert routed.side == 'inputs' and routed.shares.shape == (2, 3, 1, 2)
  np.testing.assert_array_equal(routed.shares[0, 0, 0], [5 / 8, 3 / 8])
  # As they are: (1, 3) and (2, 0).
  np.testing.assert_array_equal(routed.weights[0, 0, 0], [3 / 2, 3 / 2])


def test_a_token_without_an_expert_has_shares_of_zero():
  weights = np.zeros((1, 2, 2, 3))
  path = 'decoder/layers/mlp/wo/molora'
  (routed,) = site_weights(at(path, weights), SIDES).values()
  assert not routed.shares.any()


@pytest.mark.parametrize(
  ('path', 'side'),
  [
    ('encoder/layers/mlp/wo/m', 'inputs'),
    ('decoder/layers/self/k/m', 'targets'),
    ('decoder/layers/cross/q/m', 'targets'),
    # Keys and values of a cross-attention are of the encoder's tokens.
    ('decoder/layers/cross/k/m', 'inputs'),
    ('decoder/layers/cross/v/m', 'inputs'),
    ('decoder/layers/around_cross/m', 'targets'),
  ],
)
def test_sites_route_the_tokens_that_they_read(path, side):
  tokens = SIDES[side][0].shape
  weights = at(path, np.ones((4, *tokens, 3)))
  (routed,) = site_weights(weights, SIDES).values()
  assert routed.side == side


def test_an_embedding_of_both_sides_is_two_sites():
  calls = [np.ones((*ids.shape, 2)) for ids, _ in SIDES.values()]
  sites = site_weights(at('embed/mov', *calls), SIDES)
  assert {path: (r.side, r.shares.shape) for path, r in sites.items()} == {
    'encoder/embed/mov': ('inputs', (2, 3, 1, 2)),
    'decoder/embed/mov': ('targets', (2, 2, 1, 2)),
  }


def test_one_expert_is_no_routing():
  path = 'encoder/layers/self/q/m'
  assert site_weights(at(path, np.ones((1, 2, 3, 1))), SIDES) == {}


def test_a_router_inside_of_other_experts_is_refused():
  # [l, outer experts, b, t, e]
  weights = at('encoder/layers/mlp/wi_0/m', np.ones((2, 5, 2, 3, 4)))
  with pytest.raises(ValueError, match='inside of the experts of another'):
    site_weights(weights, SIDES)


def test_a_method_without_a_router_is_refused():
  for method in ('lora(rank=3)', 'molora(experts=1, rank=2)'):
    _, built = small.make(method)
    with pytest.raises(ValueError, match='has no router .* molora'):
      check_has_router(built.adapter_map, method)


def test_an_expert_with_at_most_a_hundredth_of_even_is_dead():
  # Even is 1/2, so that the bound is 0.005; an absent expert is not dead.
  one = site([[0.9951, 0.0049], [1, np.nan]], [], counts=(2, 1))
  np.testing.assert_array_equal(one.dead, [[False, True], [False, False]])
  # An identity expert has no parameters that could be unused.
  one = dataclasses.replace(one, identity_experts=1, counts=(2, 2))
  assert not one.dead.any()


def test_information_is_0_for_equal_and_1_for_separate_tasks():
  # Layer 0: both tasks alike; layer 1: an expert for each.
  by_task = [[[0.3, 0.7], [1, 0]], [[0.3, 0.7], [0, 1]]]
  one = site([[0.3, 0.7], [0.5, 0.5]], by_task)
  np.testing.assert_allclose(one.task_information, [0, 1], atol=1e-12)
  assert np.isnan(site([[0.3, 0.7]] * 2, by_task[:1]).task_information).all()


@pytest.fixture(scope='module')
def collected():
  return planted.collected()


def test_tasks_with_experts_of_their_own_are_seen(collected):
  (one,) = collected.sites
  assert (one.path, one.name) == (planted.PATH, 'encoder/self/q')
  assert collected.tasks == ('a', 'b')
  # Rows of 'a' have 14 letters of shares 0.8, 0.1, 0.1 and two EOS of 1/3;
  # those of 'b' 8 letters, the other way round, and three EOS.
  a = (14 * np.array([0.8, 0.1, 0.1]) + 2 / 3) / 16
  b = (8 * np.array([0.1, 0.1, 0.8]) + 3 / 3) / 11
  # The norm's eps, 1e-6 beside a mean square of 1/11, moves a logit by 1e-5.
  np.testing.assert_allclose(one.by_task[:, 0], [a, b], atol=1e-5)
  np.testing.assert_allclose(one.share[0], (16 * a + 11 * b) / 27, atol=1e-5)
  assert collected.tokens['inputs'] == 27


def test_languages_are_those_that_rows_name(collected):
  assert collected.languages == ('en', 'zh')
  # English: three 'a', one 'b' and two EOS.
  english = 3 * np.array([8, 1, 1]) / 10 + np.array([1, 1, 8]) / 10 + 2 / 3
  (one,) = collected.sites
  np.testing.assert_allclose(one.by_language[0, 0], english / 6, atol=1e-5)


def test_tokens_have_their_own_shares(collected):
  (one,) = collected.sites
  eos, first, second = 1, *ByteTokenizer().encode('ab')
  assert one.token_ids.tolist() == [eos, first, second]
  assert one.token_counts.tolist() == [5, 14, 8]
  np.testing.assert_allclose(
    one.by_token[:, 0],
    [[1 / 3] * 3, [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]],
    atol=1e-5,
  )


def test_shown_texts_have_each_token_s_shares(collected):
  _, text = collected.texts
  assert (text.task, text.language) == ('b', 'zh')
  assert text.ids['inputs'].tolist() == [*ByteTokenizer().encode('bb'), 1]
  # The decoder's tokens are its inputs, which begin with padding's id.
  assert text.ids['targets'].tolist() == [0, *ByteTokenizer().encode('y')]
  shares = text.weights[planted.PATH]
  assert shares.shape == (3, 2, 3)
  np.testing.assert_array_equal(shares[:, 0].argmax(-1), [2, 2, 0])


def test_a_heat_map_shows_the_planted_experts(collected):
  figure = plots.by_group(
    'Experts by task',
    {'q': collected.sites[0]},
    collected.tasks,
    {'q': collected.sites[0].by_task},
  )
  images = [axes.images[0] for axes in figure.axes if axes.images]
  layer = np.asarray(images[0].get_array())
  assert layer.argmax(axis=1).tolist() == [0, 2]
  labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert labels == ['a', 'b']


def test_plots_are_of_what_there_is(collected, tmp_path):
  similarity = {planted.PATH: None}
  drawn = plots.draw(collected, similarity, History(), str(tmp_path))
  assert {path.rpartition('/')[2] for path in drawn} == {
    'experts.png',
    'expert_by_task_encoder_self.png',
    'expert_by_language_encoder_self.png',
  }


AT = "targets='encoder/*/q|encoder/*/k'"


@pytest.mark.parametrize(
  'method',
  [
    # Heads routed apart, a router for two sites, columns of the rank, layers
    # with unlike experts, one router over two kinds.
    f'mov(experts=3, {AT})',
    f'molora(experts=3, rank=2, share_router=True, {AT})',
    f'mode(experts=3, rank=2, {AT})',
    f'molora(experts_per_layer=[2, 3], rank=2, {AT})',
    "moa(experts=3, rank=2, size=3, targets='encoder/*')",
  ],
)
def test_shares_are_those_of_the_metrics_log(method):
  model, _ = small.make(method, planted.CONFIG)
  variables = dict(small.variables(method, planted.CONFIG, noise=0.3))
  assert_equal_to_sums(
    model,
    variables,
    Seq2SeqCollator(ByteTokenizer(), 48, 9),
    [planted.example('a', 'to be'), planted.example('b', 'or not', 'to')],
  )


def test_shares_of_a_decoder_are_those_of_the_metrics_log():
  config = dataclasses.replace(
    small_decoders.CONFIGS['llama'], vocab=263, length=48
  )
  model, variables = small_decoders.make(
    config, 'molora(experts=3, rank=2)', noise=0.3
  )
  collator = CausalCollator(ByteTokenizer(), 48)
  # A prompt without an answer has no target, and is routed all the same.
  chat = make_sample(collator.tokenizer.encode('hello'), ())
  assert_equal_to_sums(
    model, variables, collator, [planted.example('a', 'to be'), chat]
  )


def assert_equal_to_sums(model, variables, collator, items):
  """Collected shares equal those of the sums that training logs."""
  rows = [LabeledRow(item, 'x') for item in items]
  routing = collect(model, variables, collator, rows, 3)
  encoded = (
    collator.encode_uncut(items)
    if hasattr(collator, 'encode_uncut')
    else collator.encode(items)
  )
  _, sown = jax.jit(
    lambda v, batch: model.apply(v, batch, mutable=['routing'])
  )(variables, collator.pad(encoded))
  sums = router_stats.collect(sown['routing'])
  assert {one.path for one in routing.sites} == sums.keys()
  for one in routing.sites:
    expected = np.atleast_2d(router_stats.statistics(sums[one.path]).share)
    # By column and head the sums count each; a mean is the same.
    expected = expected.reshape(-1, *one.share.shape[-2:]).mean(0)
    actual = np.nan_to_num(one.share)
    # Activations of other shapes, summed in another order.
    np.testing.assert_allclose(actual, expected, rtol=1e-4, err_msg=one.path)
