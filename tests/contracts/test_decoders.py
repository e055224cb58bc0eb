# SPDX-License-Identifier: Apache-2.0
"""Contracts of every decoder-only model: sites, caches, packing, adapters."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.decoder.model import Decoder, DecoderConfig, sites
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft import build
from moepeft.peft.methods.prefix_tuning import Prefix
from tests import ROOT

from . import small, small_decoders
from .probes import Seen
from .small_decoders import CONFIGS, LENGTHS, make, place

# Float32 sums of a few tens of numbers, in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)
# A bfloat16 is exact to 2**-8 of itself; three layers, and sums of them.
CLOSE_16 = dict(rtol=0.06, atol=0.06)

# Families that differ most; the others are for the slow suite.
QUICK = ('llama', 'gemma2', 'gpt2')


def real_of(logits):
  """Logits of real tokens, [sum of lengths, v]."""
  return np.asarray(logits)[np.asarray(small_decoders.batch()['inputs_mask'])]


def apply(model, variables, batch=None):
  run = small.jitted(model)
  return np.asarray(run(variables, batch or small_decoders.batch()))


def test_the_list_has_every_family():
  decoders = {
    name for name, family in FAMILIES.items() if family.module is Decoder
  }
  assert {config.family for config in CONFIGS.values()} == decoders


@pytest.mark.parametrize('name', CONFIGS)
def test_every_site_is_reached_and_no_other(name):
  config = CONFIGS[name]
  listed = sites(config)
  seen = set()
  Seen.log = seen
  adapter_map = AdapterMap(
    tuple((site, Seen(site, parent=None, name='seen')) for site in listed)
  )
  model = Decoder(config, adapter_map)
  rngs = {'params': jax.random.key(0), 'peft': jax.random.key(1)}
  jax.eval_shape(lambda: model.init(rngs, small_decoders.batch()))
  assert seen == set(listed)


@pytest.mark.parametrize('name', sorted(set(CONFIGS) - {'sinusoidal'}))
def test_rules_name_every_parameter(name):
  config = CONFIGS[name]
  init = lambda: Decoder(config).init(  # noqa: E731
    jax.random.key(0), small_decoders.batch()
  )
  shapes = jax.eval_shape(init)['params']
  shapes = {
    path: leaf.shape for path, leaf in weight_mapping.flatten(shapes).items()
  }
  family = FAMILIES[config.family]
  expected = weight_mapping.entries(
    family.hf.rules(config), family.axis_sizes(config), family.depths(config)
  )
  assert weight_mapping.stacked_shapes(expected) == shapes
  known = family.projections(config) | family.activations(config)
  assert set(known) <= set(sites(config))


@pytest.mark.parametrize(
  'name, attention',
  # tests/inference/engine/test_cached.py has a llama, in float64.
  small.others_slow(((name, 'naive') for name in CONFIGS), quick=QUICK[1:])
  + [('gemma2', 'chunked'), ('alibi', 'chunked'), ('mistral', 'fused')],
)
def test_cached_decoding_equals_uncached(name, attention):
  method = "lora(rank=2, targets='*/k|*/wo')"
  model, variables = make(CONFIGS[name], method, 0.1, attention=attention)
  plain, _ = make(CONFIGS[name], method)
  whole = apply(plain, variables)
  np.testing.assert_allclose(
    real_of(cached(model, variables)), real_of(whole), **CLOSE
  )


def cached(model, variables):
  """Logits [b, 11, v] by pieces of 3, 2 and then one token a row.

  Rows are shifted against each other: row i stops i tokens before the others
  in the first piece and makes up for it in the second, whose padding is
  overwritten.
  """
  ids = np.asarray(small_decoders.batch()['inputs'])

  @jax.jit
  def extend(variables, cache, new, positions):
    return model.apply(
      {**variables, **cache},
      new,
      place(positions, 13),
      method='extend',
      mutable=['cache'],
    )

  actual, cache = np.zeros((3, 11, model.config.vocab), np.float32), {}
  starts = np.zeros(3, int)
  for width, taken in ((3, [3, 2, 1]), (3, [1, 2, 3])) + ((1, [1] * 3),) * 7:
    positions = starts[:, None] + np.arange(width)
    # What stands after a row's own tokens is noise.
    new = ids[np.arange(3)[:, None], np.minimum(positions, 10)]
    new = np.where(np.arange(width) < np.array(taken)[:, None], new, 5)
    logits, cache = extend(variables, cache, new, jnp.asarray(positions))
    for row, count in enumerate(taken):
      end = starts[row] + count
      actual[row, starts[row] : end] = np.asarray(logits)[row, :count]
    starts = starts + taken
  return actual


@pytest.mark.parametrize(
  'name', small.others_slow(('llama', 'gemma2', 'gpt2'), quick=('gemma2',))
)
def test_cached_decoding_equals_uncached_in_bfloat16(name):
  half = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  model, variables = make(CONFIGS[name], **half)
  whole = apply(model, variables)
  np.testing.assert_allclose(
    real_of(cached(model, variables)), real_of(whole), **CLOSE_16
  )


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    # Each family once and each attention once; the cross is slow.
    pytest.param(
      name,
      attention,
      marks=() if (i + j) % 3 == 0 else pytest.mark.slow,
    )
    for i, name in enumerate(('gemma2', 'gpt2', 'alibi'))
    for j, attention in enumerate(('naive', 'chunked', 'fused'))
  ],
)
def test_packed_rows_equal_rows_alone(name, attention):
  config = CONFIGS[name]
  if attention == 'fused':
    config = dataclasses.replace(config, attention_cap=0.0)
  model, variables = make(config, attention=attention)
  alone = apply(make(config)[0], variables)
  ids = small_decoders.batch()['inputs']
  # Rows 1 and 2 after one another in one, and what is left is padding.
  packed = {
    'inputs': jnp.concatenate([ids[1:2, :4], ids[2:3, :7], ids[:1, :2]], 1),
    'inputs_mask': jnp.arange(13)[None] < 11,
    'inputs_segments': jnp.array([[1] * 4 + [2] * 7 + [0] * 2]),
    'inputs_positions': jnp.array([[*range(4), *range(7), 0, 0]]),
  }
  actual = apply(model, variables, packed)
  np.testing.assert_allclose(actual[0, :4], alone[1, :4], **CLOSE)
  np.testing.assert_allclose(actual[0, 4:11], alone[2, :7], **CLOSE)


@pytest.mark.parametrize('name', small.others_slow(CONFIGS, quick=QUICK))
def test_the_future_and_padding_move_nothing(name):
  model, variables = make(CONFIGS[name])
  batch = small_decoders.batch()
  before = apply(model, variables)
  changed = batch['inputs'].at[:, 4:].add(1) % 37
  after = apply(model, variables, {**batch, 'inputs': changed})
  np.testing.assert_allclose(after[:, :4], before[:, :4], **CLOSE)
  assert np.abs(after[0, 4:] - before[0, 4:]).max() > 0.01


@pytest.mark.parametrize(
  'name', small.others_slow(('qwen2', 'gemma2', 'gpt2'), quick=('gemma2',))
)
def test_scan_equals_loop(name):
  method = "molora(experts=3, rank=2, targets='*/k|*/wo')"
  model, variables = make(CONFIGS[name], method, 0.1)
  loop, _ = make(CONFIGS[name], method, scan=False)
  np.testing.assert_allclose(
    apply(loop, small.unstack(variables)), apply(model, variables), **CLOSE
  )


@pytest.mark.parametrize(
  'method',
  small.others_slow(
    (*small.ONE_EACH, "ia3(targets='*/core')"),
    quick=(*small.FEW, "ia3(targets='*/core')"),
  ),
)
@pytest.mark.parametrize(
  'name', ['gpt2', pytest.param('gemma2', marks=pytest.mark.slow)]
)
def test_adapters_start_as_the_base_and_touch_no_weight(name, method):
  config = CONFIGS[name]
  base, plain = make(config)
  model, variables = make(config, method)
  shapes = jax.tree.map(jnp.shape, variables['params'])
  assert shapes == jax.tree.map(jnp.shape, plain['params'])
  assert jax.tree.leaves(variables['peft'])
  own = {'params': plain['params'], 'peft': variables['peft']}
  np.testing.assert_allclose(apply(model, own), apply(base, plain), **CLOSE)


@pytest.mark.parametrize('attention', ['naive', 'chunked', 'fused'])
def test_advice_may_lengthen_the_keys(attention):
  config = CONFIGS['mistral']
  prefix = Prefix(3, parent=None, name='prefix')
  adapter_map = AdapterMap((('decoder/self/core', prefix),))
  plain = Decoder(config, adapter_map)
  batch = small_decoders.batch()
  rngs = {'params': jax.random.key(0), 'peft': jax.random.key(1)}
  variables = jax.jit(plain.init)(rngs, batch)
  model = Decoder(config, adapter_map, attention=attention)
  without = apply(Decoder(config), {'params': variables['params']})
  actual = apply(model, variables)
  np.testing.assert_allclose(
    real_of(actual), real_of(apply(plain, variables)), **CLOSE
  )
  assert np.abs(real_of(actual) - real_of(without)).max() > 1e-3


def test_rows_have_all_lengths():
  # A full one, and two that end at places of their own.
  assert LENGTHS[0] == 11 and len(set(LENGTHS)) == 3


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (dict(positions='some'), "got 'some'"),
    (dict(kv_heads=4), 'kv_heads divides heads'),
    (dict(head_dim=5), 'head_dim is even, as .*; got 5'),
    (dict(windowed=(True,)), 'each of the 3 layers; got 1'),
    (dict(positions='sinusoidal'), 'd_model is even, as .*; got 13'),
  ],
)
def test_shapes_that_can_not_be_are_one_sentence(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    dataclasses.replace(CONFIGS['llama'], **changes)


def test_rows_longer_than_the_learned_positions_are_refused():
  config = dataclasses.replace(CONFIGS['gpt2'], length=10)
  with pytest.raises(ValueError, match='10 learned positions; got rows of 11'):
    Decoder(config).init(jax.random.key(0), small_decoders.batch())
  # Also where texts of a row may be short enough: NaN would be learned.
  places = jnp.broadcast_to(jnp.arange(11), (3, 11))
  packed = small_decoders.batch() | {
    'inputs_segments': jnp.ones((3, 11), jnp.int32),
    'inputs_positions': places,
  }
  with pytest.raises(ValueError, match='10 learned positions; got rows of 11'):
    Decoder(config).init(jax.random.key(0), packed)


def test_padding_beyond_the_learned_positions_is_harmless():
  model, variables = make(CONFIGS['gpt2'])
  # 19 positions: a first piece of 16, then 5 places of which 3 are there.
  ids = np.random.default_rng(3).integers(2, 37, (2, 21))
  whole = apply(model, variables, {'inputs': jnp.asarray(ids[:, :19])})
  logits, cache = [], {}
  for start, end in ((0, 16), (16, 21)):
    places = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
    extend = functools.partial(model.apply, method='extend', mutable=['cache'])
    actual, cache = jax.jit(extend)(
      {**variables, **cache}, jnp.asarray(ids[:, start:end]), place(places, 21)
    )
    logits.append(actual)
  logits = np.concatenate(logits, axis=1)[:, :19]
  np.testing.assert_allclose(logits, whole, **CLOSE)


def test_the_registry_builds_what_it_lists():
  for name, family in FAMILIES.items():
    if family.module is not Decoder:
      continue
    for size in family.sizes:
      config = family.config(size)
      assert isinstance(config, DecoderConfig) and config.family == name
      build('molora(experts=3, rank=2)', family.sites(config))
    with pytest.raises(ValueError, match="got 'huge'"):
      family.config('huge')
    with pytest.raises(ValueError, match="no versions, .*version='3.1'"):
      family.config(next(iter(family.sizes)), '3.1')
    assert family.config(size, '1.1') == family.config(size)


@pytest.mark.slow
def test_layouts_change_neither_gradients_nor_tokens_of_a_decoder(tmp_path):
  flags = os.environ.get('XLA_FLAGS', '')
  env = os.environ | {
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
  }
  path = tmp_path / 'found.json'
  command = [sys.executable, '-m', 'tests.contracts.decoded', str(path)]
  done = subprocess.run(
    command, env=env, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  actual = json.loads(path.read_text())
  assert actual.pop('devices') == 8
  expected, *_ = actual.pop('one')
  # Of l d k h: d over eight devices, k over four, which eight do not divide.
  shares = {'dp': 1, 'fsdp': 1 / 8, 'tp': 1 / 4, 'tp8': 1}
  for name, (tokens, off, stored) in actual.items():
    assert tokens == expected, name
    assert stored == shares[name], name
    # The loss and every gradient, but for the order of float32 sums, which
    # weights three times their usual size make more of: 4e-4 was seen.
    assert max(off.values()) <= 2e-3, (name, off)
