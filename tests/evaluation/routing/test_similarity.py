# SPDX-License-Identifier: Apache-2.0
"""Similarities of experts and overlaps of sites equal their definitions."""

import types

import numpy as np
import pytest

from moepeft.evaluation.routing.overlap import Moments
from moepeft.evaluation.routing.similarity import expert_similarity

LAYERS, E, R = 2, 3, 2
# Axes with heads: in (3, 5), out 7.
IN, OUT = (3, 5), (7,)


def mixture(**fields):
  defaults = {'experts': E, 'shared_experts': 0, 'share': '', 'ranks': ()}
  return types.SimpleNamespace(**(defaults | fields))


def normal(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape)


def cosines(changes):
  """[l, e, e] of the changes [l, e, ...], flattened."""
  flat = changes.reshape(*changes.shape[:2], -1)
  flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
  return flat @ flat.swapaxes(1, 2)


@pytest.mark.parametrize('share', ['', 'a', 'b'])
def test_low_rank_experts_have_the_cosines_of_their_products(share):
  a = normal(LAYERS, *IN, *(() if share == 'a' else (E,)), R)
  b = normal(LAYERS, *(() if share == 'b' else (E,)), R, *OUT)
  left = 'lxyr' if share == 'a' else 'lxyer'
  right = 'lro' if share == 'b' else 'lero'
  expected = cosines(np.einsum(f'{left},{right}->lexyo', a, b))
  actual = expert_similarity(mixture(share=share), {'a': a, 'b': b}, True)
  np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_columns_beyond_a_rank_do_not_count():
  a, b = normal(LAYERS, 15, E, R), normal(LAYERS, E, R, 7)
  actual = expert_similarity(mixture(ranks=(1, 2, 2)), {'a': a, 'b': b}, True)
  a[:, :, 0, 1] = 0
  expected = cosines(np.einsum('lier,lero->leio', a, b))
  np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_cores_and_initial_factors_are_parts_of_the_change():
  a, b, core = normal(LAYERS, 15, R), normal(LAYERS, R, 7), normal(2, E, R, R)
  actual = expert_similarity(
    mixture(share='ab'), {'a': a, 'b': b, 'core': core}, True
  )
  expected = cosines(np.einsum('lir,lers,lso->leio', a, core, b))
  np.testing.assert_allclose(actual, expected, atol=1e-12)
  a, b, a0, b0 = (normal(*s) for s in 2 * [(LAYERS, 15, E, R), (2, E, R, 7)])
  arrays = {'a': a + 1, 'b': b, 'initial_a': a0, 'initial_b': b0}
  changes = np.einsum('lier,lero->leio', a + 1, b)
  changes -= np.einsum('lier,lero->leio', a0, b0)
  actual = expert_similarity(mixture(), arrays, True)
  np.testing.assert_allclose(actual, cosines(changes), atol=1e-12)


def test_scales_are_compared_by_their_distance_from_one():
  scale = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 5.0]])
  # Changes (1, 0), (-1, 0) and (0, 4), at a site outside of the layers.
  actual = expert_similarity(mixture(), {'scale': scale}, False)
  np.testing.assert_array_equal(actual, [[[1, -1, 0], [-1, 1, 0], [0, 0, 1]]])


def test_experts_without_a_change_have_no_cosine():
  arrays = {'a': normal(LAYERS, 15, E, R), 'b': np.zeros((LAYERS, E, R, 7))}
  assert np.isnan(expert_similarity(mixture(), arrays, True)).all()
  # Parameters of which no change of weights is known.
  assert expert_similarity(mixture(), {'key': normal(2, E, 4)}, True) is None


def overlap(**shares):
  moments = Moments()
  # In two parts, as batches come.
  for part in (slice(3), slice(3, None)):
    moments.add(
      {
        path: np.array(a, np.float32)[part][:, None]
        for path, a in shares.items()
      }
    )
  return moments.result().values[0]


def test_sites_overlap_whatever_the_order_of_their_experts():
  # Tokens 0, 0, 1, 1, 2, 2 by expert; the second site calls them 2, 0, 1.
  one = np.eye(3)[[0, 0, 1, 1, 2, 2]]
  np.testing.assert_allclose(overlap(a=one, b=one[:, [2, 0, 1]]), 1, rtol=1e-9)


def test_independent_sites_do_not_overlap():
  one, other = np.eye(2)[[0, 0, 1, 1]], np.eye(2)[[0, 1, 0, 1]]
  np.testing.assert_allclose(overlap(a=one, b=other), np.eye(2), atol=1e-12)


def test_a_site_that_routes_all_tokens_alike_has_no_overlap():
  one = np.eye(2)[[0, 0, 1, 1]]
  even = np.full((4, 2), 0.5)
  np.testing.assert_array_equal(
    overlap(a=one, b=even), [[1, np.nan], [np.nan, np.nan]]
  )
