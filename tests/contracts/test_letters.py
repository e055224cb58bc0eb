# SPDX-License-Identifier: Apache-2.0
"""Every array has the names of its axes, under whatever transform it is."""

from collections import defaultdict

import jax
import pytest
from jax.sharding import PartitionSpec as P

from moepeft.core.types import AXIS_NAMES
from moepeft.models import weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import Constant, logical_axes, param
from moepeft.peft import build

from . import small
from .probes import PROBES

# Experts and ranks unlike every size of the base.
METHODS = tuple(
  method.replace('experts=3', 'experts=7')
  .replace('rank=3', 'rank=13')
  .replace('size=3', 'size=13')
  for method in (
    *small.METHODS,
    "ia3(targets='*')",
    "lora(targets='*/o')",
    'full',
  )
)
# Every site and sublayer, every kind of kernel, and every kind of array.
QUICK = (
  "ia3(targets='*')",
  'dora(rank=13)',
  'mov(experts=7)',
  'molora(experts=7, rank=2)',
  "mixture(expert=lora(rank=2), experts=7, share='a')",
  "tokens(new='3|5-7')",
  'prompt(length=2)',
  'prefix(length=2, hidden=4)',
)
# The sizes of small.GATED and small.RELU; a router reads d, n h, f, h, the rank
# of x A, or a task's vector of 64.
SIZES = {
  'd': {11},
  'n': {3},
  'k': {3},
  'h': {5},
  'f': {17},
  'v': {37},
  'p': {32},
  'l': {2, 3},
  # 8 of a preset that counts its experts by layer; two and six kinds of seven.
  'e': {7, 8, 14, 42},
  # 16 of the MLP of ldmole's router, 4 x 42 of that of moa's.
  'r': {1, 2, 4, 13, 16, 168},
  # Two tasks, and none.
  'g': {3},
  'm': {2},
  'i': {11, 15, 17, 5, 2, 64},
}


LETTERS = {name: letter for letter, name in AXIS_NAMES.items()}


def sizes_of(model):
  """{letter: the sizes of all axes of its name}."""
  shapes = jax.eval_shape(lambda: model.init(small.RNGS, small.batch()))
  actual = defaultdict(set)
  for name, tree in logical_axes(model, small.batch()).items():
    said, expected = (
      weight_mapping.flatten(tree),
      weight_mapping.flatten(shapes.get(name, {})),
    )
    assert said.keys() == expected.keys()
    for path, leaf in expected.items():
      assert len(said[path]) == len(leaf.shape), path
      for name, size in zip(said[path], leaf.shape, strict=True):
        actual[LETTERS[name]].add(size)
  return actual


def fits(found, sizes):
  return all(found[letter] <= sizes.get(letter, set()) for letter in found)


CASES = small.others_slow(
  ((method, small.GATED) for method in METHODS), quick=QUICK
) + small.others_slow(
  ((method, small.RELU) for method in ("ia3(targets='*')", 'full')), quick=()
)


@pytest.mark.parametrize(
  ('method', 'config'),
  CASES,
  ids=lambda v: v if isinstance(v, str) else '1.1' if v.gated else '1.0',
)
def test_every_axis_has_the_size_of_its_letter(method, config):
  model, _ = small.make(method, config)
  actual = sizes_of(model)
  assert fits(actual, SIZES), actual
  assert actual['l'] == {2, 3}


def test_layers_that_are_written_out_have_no_axis_of_layers():
  method = "molora(experts=7, rank=2, targets='*/q|*/wo')"
  model, _ = small.make(method, scan=False)
  actual = sizes_of(model)
  assert fits(actual, SIZES), actual
  assert 'l' not in actual


def test_what_depends_on_the_base_and_what_is_vmapped_says_its_letters_too():
  for method in PROBES:
    built = build(method, t5.sites(small.GATED), methods=PROBES)
    actual = sizes_of(t5.T5(small.GATED, built.adapter_map))
    # The experts of a mixture are 3, of molora 10; a prefix has 20 vectors.
    r = SIZES['r'] | {20}
    assert fits(actual, SIZES | {'e': {3, 10}, 'r': r}), (method, actual)
  inner = "molora(experts=7, rank=2, targets='*/wi_0') + mixture"
  advice = build(inner, t5.sites(small.GATED), methods=PROBES).adapter_map
  tree = logical_axes(t5.T5(small.GATED, advice), small.batch())['peft']
  wi_0 = tree['encoder']['layers']['mlp']['wi_0']['molora']
  # A layer's 3 experts hold 7 each.
  stacked = ('layers', 'experts')
  assert wi_0['a'] == P(*stacked, 'embed', 'experts', 'rank')
  assert wi_0['b'] == P(*stacked, 'experts', 'rank', 'mlp')


def test_a_letter_too_few_is_refused_with_the_array_s_path():
  import flax.linen as nn

  class Wrong(nn.Module):
    @nn.compact
    def __call__(self, batch):
      return param(self, 'kernel', Constant(1), (3, 5), 'd')

  with pytest.raises(ValueError, match=r"kernel: .*\(3, 5\); got 'd'"):
    logical_axes(Wrong(), {})
