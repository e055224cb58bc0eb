# SPDX-License-Identifier: Apache-2.0
"""Counts from shapes alone agree with the published ones."""

import json
import re
import tracemalloc

import jax
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_parameters import count, count_trained
from tests import ROOT

PAPER = ROOT.parent / 'shared' / 'paper'
FILE = PAPER / 'parameter_counts.json'
# Zadouri et al., arXiv:2309.05444, released code's shapes; base sizes are
# those of the public checkpoints.
KNOWN = [
  ('large', 'ia3', 783_150_080, 282_624),
  ('large', 'mov(experts=10)', 783_150_080, 4_270_080),
  ('xl', 'mov(experts=20)', 2_849_757_184, 15_912_960),
  ('xl', 'molora(experts=2, rank=4)', 2_849_757_184, 16_809_984),
  ('xxl', 'lora(rank=4)', 11_135_332_352, 14_942_208),
  ('xxl', 'molora(experts=10, rank=4)', 11_135_332_352, 168_099_840),
]


def card(size, method):
  c = config_lib.paper(size)
  c.method = method
  return c


@pytest.mark.parametrize(('size', 'method', 'params', 'peft'), KNOWN)
def test_counts_are_the_published_ones(size, method, params, peft):
  actual = count(card(size, method))
  assert (actual['params'], actual['peft']) == (params, peft)
  assert actual['percent'] == pytest.approx(100 * peft / params, abs=1e-4)
  assert sum(actual['by_site'].values()) == peft


@pytest.mark.skipif(not FILE.exists(), reason=f'{FILE} is not at hand')
@pytest.mark.slow
def test_counts_agree_with_the_whole_file():
  counts = json.loads(FILE.read_text())
  for size, total in counts['base'].items():
    assert count(card(size, 'full'))['params'] == total
  for size, methods in counts['trainable_official'].items():
    for method, expected in methods.items():
      assert count(card(size, method))['peft'] == expected, (size, method)


def test_counting_the_largest_allocates_nothing():
  tracemalloc.start()
  count(card('xxl', 'molora(experts=10, rank=4)'))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # 11 billion parameters; what is traced is Python's own bookkeeping.
  assert peak < 100_000_000


def test_sites_are_named_without_layers_and_adapters():
  actual = count(card('small', 'molora(experts=2, rank=1)'))['by_site']
  assert all(re.fullmatch(r'(en|de)coder/\w+/\w+', site) for site in actual)
  # Six heads of 64 beside d 512: a d*r + b r*384 + router d, twice, 8 layers.
  assert actual['encoder/self/q'] == 8 * 2 * (512 + 384 + 512)


@pytest.mark.parametrize(
  'method',
  [
    # Arrays have the experts of the fullest layer.
    "molora(experts_per_layer=[1, 2, 4], targets='encoder/*/q')",
    # Arrays of all layers, of which a group shares one.
    'lily(rank=2)',
  ],
)
def test_arrays_are_counted_without_padding_and_copies(method):
  config = config_lib.default()
  config.method = method
  base = base_lib.load(config.model)
  model, built = base_lib.module(base, config)
  trainable = base_lib.initialise(base, model, 0)[built.trainable]
  padded = base_lib.padded_axes(model, base)
  actual, _ = count_trained(trainable, built, padded)
  assert actual == count(config)['peft']
  assert actual < sum(a.size for a in jax.tree.leaves(trainable))
