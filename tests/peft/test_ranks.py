# SPDX-License-Identifier: Apache-2.0
"""Experts of different ranks in one mixture."""

import numpy as np
import pytest

from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import shapes
from moepeft.peft import build
from moepeft.peft.method_text import canonical_text, expanded_text
from moepeft.peft.tied_layers import spare_sizes

from ..contracts import small
from .test_semantics import adapter, call, normal, projection, softmax

SITES = t5.sites(small.GATED)


@pytest.mark.parametrize(
  ('options', 'power'), [('', 1), (', rslora=True', 0.5)]
)
@pytest.mark.parametrize('share', ['', 'a'])
def test_each_expert_has_its_rank_and_scale(options, power, share):
  # Ranks 1, 3 and 2 in arrays of rank 3; scales 5 / r or 5 / sqrt(r).
  f, x, y, inside, outside = projection('q')
  ranks = (1, 3, 2)
  experts = () if share else (3,)
  tree = {
    'a': normal('a', *inside, *experts, 3),
    'b': normal('b', 3, 3, *outside),
    'router': {'kernel': normal('kernel', 11, 3)},
  }
  p = softmax(x @ tree['router']['kernel'])
  expected = y
  for e, r in enumerate(ranks):
    a = tree['a'] if share else tree['a'][:, e]
    term = np.tensordot(x @ a[:, :r], tree['b'][e, :r], 1)
    expected = expected + 5 / r**power * p[..., e, None, None] * term
  mixture = adapter(
    f"molora(ranks=[1, 3, 2], alpha=5.0, share='{share}'{options})"
  )
  np.testing.assert_allclose(
    call(mixture, tree, f, x), expected, rtol=1e-4, atol=1e-4
  )


def test_parameters_beyond_a_rank_are_not_counted():
  # Ranks 1 and 4: 5 of 8 columns. At encoder/*/q of 2 layers: A 11 x 5,
  # B 5 x 15 and a router 11 x 2, each twice.
  model, built = small.make("molora(ranks=[1, 4], targets='encoder/self/q')")
  trained = shapes(model, small.batch())['peft']
  spare = spare_sizes(trained, built.tied_arrays, built.unread_arrays)
  stored = 2 * (11 * 8 + 8 * 15 + 11 * 2)
  assert stored - sum(spare.values()) == 2 * (11 * 5 + 5 * 15 + 11 * 2)


def test_ranks_replace_rank_and_the_number_of_experts():
  text = 'molora(ranks=[1, 4])'
  assert canonical_text(text) == text
  full = expanded_text(text)
  assert 'ranks=[1, 4]' in full and ' rank=' not in full
  (mixture,) = {a for _, a in build(full, SITES).adapter_map.entries}
  assert (mixture.experts, mixture.expert.rank) == (2, 4)
  assert (mixture.router.experts, mixture.ranks) == (2, (1, 4))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ('rank=4', 'drop rank'),
    ('experts=2', 'takes one of experts and ranks'),
    ('combine=parameters', 'drop combine or ranks'),
    ('shared_experts=1', 'drop shared_experts or ranks'),
    ("dispatch='sparse'", 'drop dispatch or ranks'),
  ],
)
def test_ranks_rule_out_what_needs_equal_ones(options, message):
  with pytest.raises(ValueError, match=message):
    build(f'molora(ranks=[1, 4], {options})', SITES)
