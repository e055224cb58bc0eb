# SPDX-License-Identifier: Apache-2.0
"""What is written into a slot for an adapter."""

import dataclasses

import jax
import numpy as np
import pytest

from moepeft.checkpoints import quantize
from moepeft.inference.adapters.pool import AdapterPool
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import DecoderConfig

from .. import banked

CONFIG = DecoderConfig(
  vocab=7, d_model=5, heads=3, kv_heads=1, head_dim=2, ffn=11, layers=2
)


@pytest.fixture(scope='module')
def base():
  return banked.base_of(CONFIG)


def fitted(base, path):
  banks = AdapterPool(base, {'it': path}, slots=2)
  return weight_mapping.flatten(banks.read(path).tree)


def test_ranks_are_padded_with_zeros_and_the_scale_is_in_b(base, tmp_path):
  method = "molora(experts=3, rank=2, alpha=3.0, targets='*/k')"
  path, _, tree = banked.save(tmp_path / 'a', base, method)
  own = tree['decoder']['layers']['self']['k']['molora']
  actual = fitted(base, path)
  at = 'decoder/layers/self/k/molora'
  # [l, d, e, r] and [l, e, r, k, h], the rank of two padded to four.
  a, b = actual[f'{at}/a'], actual[f'{at}/b']
  assert a.shape == (2, 5, 3, 4) and b.shape == (2, 3, 4, 1, 2)
  np.testing.assert_array_equal(a[..., :2], own['a'])
  np.testing.assert_array_equal(b[:, :, :2], own['b'] * np.float32(1.5))
  assert not a[..., 2:].any() and not b[:, :, 2:].any()
  # Sites that it leaves out add nothing.
  assert not actual['decoder/layers/self/q/molora/b'].any()


def test_scales_are_ones_where_no_adapter_is(base, tmp_path):
  path, _, _ = banked.save(tmp_path / 'a', base, "ia3(targets='*/k')")
  actual = fitted(base, path)
  np.testing.assert_array_equal(actual['decoder/layers/self/v/ia3/scale'], 1)
  assert (actual['decoder/layers/self/k/ia3/scale'] != 1).all()


def test_a_mixture_of_vectors_is_on_where_it_acts(base, tmp_path):
  path, _, _ = banked.save(
    tmp_path / 'a', base, "mov(experts=3, targets='*/k')"
  )
  actual = fitted(base, path)
  # A switch for each layer.
  np.testing.assert_array_equal(actual['decoder/layers/self/k/mov/on'], [1, 1])
  np.testing.assert_array_equal(actual['decoder/layers/self/v/mov/on'], [0, 0])


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_doras_ratio_is_of_the_weight_that_is_served(base, tmp_path, kind):
  """The same of a quantised base and of one that holds its values."""
  packed = quantize.pack(base.params, CONFIG, kind)
  values = quantize.unpack(packed, CONFIG)
  ratios = []
  for params, remaining in ((packed, kind), (values, '')):
    one = dataclasses.replace(base, params=params, quantise=remaining)
    path, _, _ = banked.save(
      tmp_path / (remaining or 'plain'), one, 'dora(rank=2)'
    )
    actual = fitted(one, path)
    ratios.append({p: a for p, a in actual.items() if p.endswith('/ratio')})
  # q, k, v, o, and three of the feed-forward, but for wi_1.
  assert len(ratios[0]) == len(ratios[1]) >= 6
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *ratios
  )


def test_dora_at_the_head_is_refused(base, tmp_path):
  path, _, _ = banked.save(tmp_path / 'a', base, "dora(targets='head')")
  with pytest.raises(ValueError, match='dora at head cannot be served'):
    AdapterPool(base, {'it': path})
