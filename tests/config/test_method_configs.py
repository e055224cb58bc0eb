# SPDX-License-Identifier: Apache-2.0
"""configs/methods has a config of each published mixture."""

import dataclasses
import importlib.util
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import registries
from moepeft.config import method_string
from moepeft.config.check import check
from moepeft.models import FAMILIES
from moepeft.moe import aux_losses
from moepeft.peft import METHODS, build
from moepeft.training.optimizers import make_optimizer
from tests import ROOT

FOLDER = ROOT / 'configs' / 'methods'
# Configs of methods that are no mixtures; tested below.
BASELINES = {'adalora', 'loraplus'}
NAMES = sorted({path.stem for path in FOLDER.glob('*.py')} - BASELINES)
# Mixtures of adapters that are trained already.
OF_ADAPTERS = {'arrow', 'hardrouted', 'phatgoose', 'xlora'}
# They need a decoder-only model, which the embedded one is not.
OF_DECODERS = {'xlora'}
# Their data name tasks, which conversations do not.
OF_TASKS = {'moelora', 'mhr', 'poly'}


def read(name, values=''):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(values)


def test_every_preset_has_a_config():
  presets = {name for name, entry in METHODS.items() if entry.expert}
  assert {*NAMES} == presets


@pytest.mark.parametrize(
  ('name', 'values'),
  [
    *((name, '') for name in NAMES if name not in OF_DECODERS),
    *((n, 'model=smollm2,data=rows.json') for n in NAMES if n not in OF_TASKS),
  ],
)
def test_a_config_is_valid_and_has_its_preset(name, values):
  config = read(name, values)
  check(config, registries.BY_KEY)
  aux_losses.check_weights(config.router_losses)
  family = FAMILIES['llama' if values else 't5']
  sites = family.sites(family.sizes['smollm2-135m' if values else 'small'])
  built = build(config.method, sites)
  assert built.adapter_map.entries[0][1].name == name
  assert config.objective == ('causal' if values else 'seq2seq')


@pytest.mark.parametrize('name', NAMES)
def test_a_config_says_how_it_differs_and_its_scale(name):
  text = (FOLDER / f'{name}.py').read_text()
  assert re.search(r'^differs: \w', text, re.MULTILINE)
  scale = re.search(r'^scale: (.*?)(,|;|\.\s)', text, re.MULTILINE)[1]
  family = FAMILIES['llama' if name in OF_DECODERS else 't5']
  sites = family.sites(next(iter(family.sizes.values())))
  expert = build(name, sites).adapter_map.entries[0][1].expert
  # Of several kinds of experts, those at the first site.
  expert = expert.at_site[0].expert if hasattr(expert, 'at_site') else expert
  if hasattr(expert, 'alpha'):
    alpha, rank, value = map(
      float, re.search(r'= ([\d.]+) / ([\d.]+) = ([\d.]+)', scale).groups()
    )
    assert alpha / rank == value == expert.alpha / expert.rank
  else:
    assert scale == 'none'


@pytest.mark.parametrize('rate', [5e-5, 0.001])
def test_loraplus_trains_b_at_16_times_the_rate_of_a(rate):
  config = read('loraplus')
  config.optimizer.learning_rate = rate
  check(config, registries.BY_KEY)
  optimizer = make_optimizer(config.optimizer, config.steps)
  params = {'q': {'lora': {'a': jnp.zeros(3), 'b': jnp.zeros(3)}}}
  gradient = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  # AdamW's first step is the rate; the warm-up has 15 steps of 300.
  rate /= 15
  updates = updates['q']['lora']
  np.testing.assert_allclose(updates['a'], np.full(3, -rate), rtol=1e-5)
  np.testing.assert_allclose(updates['b'], 16 * updates['a'], rtol=1e-5)


def test_b_of_hmora_has_1_2_times_the_rate():
  config = read('hmora')
  optimizer = make_optimizer(config.optimizer, config.steps)
  params = {'q': {'hmora': {'a': jnp.zeros(3), 'b': jnp.zeros(3)}}}
  gradient = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  updates = updates['q']['hmora']
  np.testing.assert_allclose(updates['b'], 1.2 * updates['a'], rtol=1e-5)


def mixtures_of_the_guide():
  """{preset: the mixture that docs/methods.md writes out}."""
  text = (ROOT / 'docs' / 'methods.md').read_text()
  rows = re.findall(r'^\| `(\w+)` \| `(mixture\(.*?\))`', text, re.MULTILINE)
  return {name: text.replace('[...]', "['a']") for name, text in rows}


def options(module):
  """{option: value} of an adapter, but how it is drawn."""
  if isinstance(module, tuple):
    return tuple(map(options, module))
  if not isinstance(module, nn.Module):
    return module
  return {
    field.name: options(value)
    for field in dataclasses.fields(module)
    if field.name not in ('name', 'parent', 'a_init', 'kernel_init')
    for value in (getattr(module, field.name),)
  }


@pytest.mark.parametrize('name', NAMES)
def test_the_guide_writes_out_a_preset(name):
  family = FAMILIES['llama' if name in OF_DECODERS else 't5']
  sites = family.sites(next(iter(family.sizes.values())))
  text = mixtures_of_the_guide()[name]
  router = re.search(r'router=(.*)\)', text)
  preset = f'{name}(router={router[1]})' if name in OF_TASKS else name
  written, built = (
    options(build(method, sites).adapter_map.entries[0][1])
    for method in (text, preset)
  )
  assert written == built


@pytest.mark.parametrize('values', ['', 'steps=3900'])
def test_adalora_lowers_ranks_in_the_shares_of_the_script(values):
  config = read('adalora', values)
  check(config, registries.BY_KEY)
  family = FAMILIES['t5']
  built = build(config.method, family.sites(family.sizes['small']))
  _, adapter = built.adapter_map.entries[0]
  # Of 300 steps 46.2 and 138.5.
  schedule = (600, 1800) if values else (46, 138)
  assert (adapter.tinit, adapter.tfinal) == schedule
  assert (adapter.alpha, adapter.rank, adapter.scale) == (32, 2, 16)


@pytest.mark.parametrize('name', sorted(OF_ADAPTERS))
def test_a_config_takes_the_paths_of_trained_adapters(name):
  config = read(name, 'model=smollm2,data=rows.json,adapters=runs/a|runs/b')
  spec = method_string.parse_method(config.method)[0]
  assert spec.get('from_adapters') == ('runs/a', 'runs/b')
