# SPDX-License-Identifier: Apache-2.0
"""Contracts of every model: sites, decoding, depth, devices."""

import dataclasses
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.models import FAMILIES
from moepeft.models.t5 import model as t5
from moepeft.nn.adapter_hook import AdapterMap

from .. import commands
from . import answers, small
from .probes import Seen

CLOSE = dict(rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  'config', [small.GATED, small.RELU], ids=['1.1', '1.0']
)
def test_every_site_is_reached_and_no_other(config):
  listed = t5.sites(config)
  seen = set()
  adapter_map = AdapterMap(
    tuple((site, Seen(site, parent=None, name='seen')) for site in listed)
  )
  Seen.log = seen
  model = t5.T5(config, adapter_map)
  rngs = {'params': jax.random.key(0), 'peft': jax.random.key(1)}
  jax.eval_shape(lambda: model.init(rngs, small.batch()))
  assert seen == set(listed)


@pytest.mark.parametrize(
  'method, config',
  [
    # T5 1.1 is in tests/inference/engine: test_encoder_decoder.py has the base
    # and test_cached.py a mixture, in float64.
    pytest.param(
      method,
      config,
      id=f'{method}-{name}',
      marks=() if (method, name) == (None, '1.0') else pytest.mark.slow,
    )
    for method in (
      None,
      'mov(experts=3)',
      'molora(experts=3, rank=2)',
      "ia3(targets='*/core')",
    )
    for name, config in (('1.1', small.GATED), ('1.0', small.RELU))
  ],
)
def test_cached_decoding_equals_uncached(method, config):
  model, variables = t5.T5(config), small.variables('full', config)
  if method:
    model, _ = small.make(method, config)
    variables = small.variables(method, config, noise=0.1)
  prompts = answers.real_rows(small.batch())
  tokens = answers.engine_greedy(model, variables, prompts, 9)
  for prompt, answer in zip(prompts, tokens, strict=True):
    assert answer == answers.uncached_greedy(model, variables, prompt, 9)


@pytest.mark.parametrize(
  'method', small.others_slow(('full', *small.FEW), quick=small.FEW[1:])
)
def test_the_program_does_not_grow_with_depth(method):
  def program(layers):
    config = dataclasses.replace(
      small.GATED, encoder_layers=layers, decoder_layers=layers
    )
    model, _ = small.make(method, config)
    shapes = jax.eval_shape(
      lambda: model.init(
        {'params': jax.random.key(0), 'peft': jax.random.key(1)}, small.batch()
      )
    )
    shapes.pop('routing', None)

    def loss(variables):
      return jnp.sum(model.apply(variables, small.batch()))

    text = jax.jit(jax.grad(loss)).lower(shapes).as_text()
    return len(re.findall(r'\n', text))

  assert program(2) == program(13)


def test_packed_rows_equal_rows_alone():
  model, variables = t5.T5(small.GATED), small.variables('full')
  one, two = np.array([[5, 6, 7, 1]]), np.array([[9, 8, 1]])
  y1, y2 = np.array([[0, 11, 12]]), np.array([[0, 13]])
  packed = {
    'inputs': np.concatenate([one, two, [[0]]], 1),
    'decoder_inputs': np.concatenate([y1, y2], 1),
    'inputs_mask': np.array([[True] * 7 + [False]]),
    'inputs_segments': np.array([[1] * 4 + [2] * 3 + [0]]),
    'targets_segments': np.array([[1] * 3 + [2] * 2]),
  }
  apply = jax.jit(model.apply)
  logits = apply(variables, packed)
  for x, y, at in ((one, y1, slice(0, 3)), (two, y2, slice(3, 5))):
    alone = apply(variables, {'inputs': x, 'decoder_inputs': y})
    np.testing.assert_allclose(logits[:, at], alone, **CLOSE)


@pytest.mark.parametrize(
  'size', ['tiny', 'small', 'base', 'large', 'xl', 'xxl']
)
@pytest.mark.parametrize('version', ['1.0', '1.1'])
def test_every_released_size_has_a_config(size, version):
  config = t5.config(size, version)
  assert config.gated == (version == '1.1') != config.tied


def test_unknown_sizes_and_policies_are_named():
  with pytest.raises(ValueError, match="got 'huge'"):
    t5.config('huge')
  with pytest.raises(ValueError, match="got '2.0'"):
    t5.config('small', '2.0')
  model = t5.T5(small.GATED, remat='some')
  with pytest.raises(ValueError, match="got 'some'"):
    model.init(jax.random.key(0), small.batch())


def test_families_have_what_the_commands_ask_of_them():
  for family in FAMILIES.values():
    assert callable(family.sites) and callable(family.config)
    assert issubclass(family.module, nn.Module)


# Compiling for eight devices takes long: one site of heads and one without, and
# a router with state, which have every kind of leaf; a decoder has one stack.
_STATEFUL = (
  "molora(experts=3, rank=2, router=balanced(k=2), targets='*/self/q|*/mlp/wo')"
)


@pytest.mark.parametrize(
  ('family', 'methods'),
  [
    ('llama', (_STATEFUL,)),
    pytest.param(
      't5',
      (
        _STATEFUL,
        small.ONE_EACH[-1].replace('topk', 'balanced'),
        *small.ONE_EACH,
        'full',
      ),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_eight_virtual_devices_equal_one(family, methods, tmp_path):
  path = tmp_path / 'trained.npz'
  flag = '--xla_force_host_platform_device_count=8'
  env = os.environ | {
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}',
    'JAX_PLATFORMS': 'cpu',
  }
  module = 'tests.contracts.devices'
  done = commands.run(module, path, family, *methods, env=env)
  assert done.returncode == 0, done.stderr
  arrays = np.load(path)
  one, eight = (
    {
      name.removeprefix(f'{count}|'): arrays[name]
      for name in arrays
      if name.startswith(f'{count}|')
    }
    for count in (1, 8)
  )
  assert one.keys() == eight.keys()
  for method in methods:
    names = [name for name in one if name.startswith(f'{method}|')]
    assert f'{method}|loss' in names and len(names) > 1
  for name in one:
    # Sums over 8 rows in another order, then three Adam steps.
    close = dict(rtol=2e-4, atol=2e-5) if 'loss' not in name else {'rtol': 1e-5}
    np.testing.assert_allclose(one[name], eight[name], **close)
