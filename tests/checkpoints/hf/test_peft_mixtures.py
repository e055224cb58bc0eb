# SPDX-License-Identifier: Apache-2.0
"""Mixtures that `peft` has too compute its logits with copied parameters."""

import json

import jax
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import weight_mapping
from moepeft.models.decoder.model import Decoder, sites
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build

from ...contracts import small, small_decoders
from .test_peft_decoders import IDS, base, shaken, torch_logits

# The order in which peft finds the modules of a layer, as sites.
SITES = ('self/q', 'self/v', 'mlp/wi_0')
MODULES = ['q_proj', 'v_proj', 'gate_proj']
EXPERTS = 2


def xlora_of_peft(folder, **options):
  """(logits of an X-LoRA, weight and bias of its classifier)."""
  reference = pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  base('Llama').save_pretrained(folder / 'base')

  def model():
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder / 'base', use_cache=False)

  adapters = {}
  for i in range(EXPERTS):
    config = reference.LoraConfig(
      r=3,
      lora_alpha=5,
      target_modules=MODULES,
      init_lora_weights=False,
      task_type='CAUSAL_LM',
    )
    adapter = reference.get_peft_model(model(), config)
    shaken([p for p in adapter.parameters() if p.requires_grad], adapter, 0.3)
    adapters[str(i)] = str(folder / f'adapter_{i}')
    adapter.save_pretrained(adapters[str(i)])
  config = reference.XLoraConfig(
    task_type='CAUSAL_LM', hidden_size=12, adapters=adapters, **options
  )
  mixture = reference.get_peft_model(model(), config).eval()
  head = mixture.base_model.internal_xlora_classifier.layers[0]
  shaken(head.parameters(), mixture, 1.0)
  weight, bias = (p.detach().numpy() for p in head.parameters())
  return torch_logits(mixture), weight, bias


@pytest.mark.parametrize(
  ('router', 'options'),
  [
    ('softmax(bias=True)', {'layerwise_scalings': True}),
    pytest.param(
      'softmax(bias=True, temperature=0.5)',
      {'softmax_temperature': 0.5},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'topk(k=1, bias=True, renormalize=False)',
      {'layerwise_scalings': True, 'top_k_lora': 1},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_xlora_equals_peft_s(router, options, tmp_path):
  expected, weight, bias = xlora_of_peft(tmp_path, **options)
  paths = [str(tmp_path / f'adapter_{i}') for i in range(EXPERTS)]
  config = config_lib.default()
  config.model.path = str(tmp_path / 'base')
  config.method = f'xlora(from_adapters={paths}, router={router})'
  loaded = base_lib.load(config.model)
  model, built = base_lib.module(loaded, config)
  variables, _ = base_lib.with_experts(
    base_lib.initialise(loaded, model, 0), model, built, loaded
  )
  arrays = weight_mapping.flatten(variables['peft'])
  # A classifier [layers, sites, e, d], or [1, 1, e, d] for all of them.
  layers, sites = (3, len(SITES)) if 'layerwise_scalings' in options else (1, 1)
  weight = weight.reshape(layers, sites, EXPERTS, -1)
  bias = bias.reshape(layers, sites, EXPERTS)
  weight = np.broadcast_to(weight, (3, len(SITES), *weight.shape[2:]))
  bias = np.broadcast_to(bias, (3, len(SITES), EXPERTS))
  for i, site in enumerate(SITES):
    path = f'decoder/layers/{site}/xlora/router'
    arrays[f'{path}/kernel'] = weight[:, i].swapaxes(1, 2)
    arrays[f'{path}/bias'] = bias[:, i]
  variables['peft'] = weight_mapping.unflatten(arrays)
  actual = small.jitted(model)(variables, {'inputs': IDS})
  # float32 sums in another order, through three layers.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  base_logits = small.jitted(model)(
    variables | {'peft': jax.tree.map(np.zeros_like, variables['peft'])},
    {'inputs': IDS},
  )
  assert np.abs(base_logits - expected).max() > 0.1


def poly_of_peft(folder, **options):
  """Saves a Poly; its logits for rows of the tasks 0 and 2."""
  reference = pytest.importorskip('peft')
  model = base('Llama')
  model.save_pretrained(folder / 'base')
  config = reference.PolyConfig(
    r=3, n_tasks=3, n_skills=2, task_type='CAUSAL_LM', **options
  )
  model = reference.get_peft_model(model, config).eval()
  shaken([p for p in model.parameters() if p.requires_grad], model, 0.5)
  model.save_pretrained(folder / 'adapter')
  return poly_logits(model)


def poly_logits(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    ids, tasks = torch.tensor(IDS), torch.tensor([0, 2])
    return model(input_ids=ids, task_ids=tasks).logits.numpy()


POLY = dict(target_modules=r'.*layers\.[02]\..*\.(q|v|o)_proj', n_splits=2)


@pytest.mark.parametrize(
  'options',
  [POLY, pytest.param(POLY | {'n_splits': 1}, marks=pytest.mark.slow)],
  ids=['mhr', 'poly'],
)
def test_poly_equals_peft_s_and_goes_back(options, tmp_path):
  expected = poly_of_peft(tmp_path, **options)
  loaded = hf.load(str(tmp_path / 'base'))
  adapter = peft.load(str(tmp_path / 'adapter'), loaded.config)
  built = build(adapter.method, sites(loaded.config))
  model = Decoder(loaded.config, built.adapter_map)
  # Task i of peft is number i + 1, after padding.
  tasks = np.broadcast_to([[1], [3]], IDS.shape)
  variables = {'params': loaded.params, 'peft': adapter.tree}
  batch = {'inputs': IDS, 'inputs_tasks': tasks}
  actual = small.jitted(model)(variables, batch)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  others = batch | {'inputs_tasks': tasks // 3 + 1}
  other = small.jitted(model)(variables, others)
  assert np.abs(other - expected).max() > 0.01
  # Back, with a scale that peft does not have.
  method = adapter.method.replace('rank=3', 'rank=3, alpha=2.0')
  tree = jax.tree_util.tree_map_with_path(
    lambda path, a: a / 2 if path[-1].key == 'b' else a, adapter.tree
  )
  peft.save(
    str(tmp_path / 'back'),
    loaded.config,
    adapter._replace(method=method, tree=tree),
  )
  reference = pytest.importorskip('peft')
  transformers = pytest.importorskip('transformers')
  plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
  theirs = reference.PeftModel.from_pretrained(plain, tmp_path / 'back')
  np.testing.assert_allclose(
    poly_logits(theirs.eval()), expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (
      "poly(router=poly(tasks=['0']), combine=outputs, targets='*/q')",
      'merges',
    ),
    ("mhr(router=poly(tasks=['0'], splits=5), targets='*/q')", 'that divide'),
    ("poly(router=softmax, targets='*/q')", 'by task'),
    ("poly(router=poly(tasks=['0']), targets='head')", 'at projections'),
  ],
)
def test_mixtures_that_peft_s_poly_is_not_are_refused(method, message):
  config = small_decoders.CONFIGS['llama']
  leaves = {method.partition('(')[0]: {'a': np.zeros(1)}}
  tree = {'head': leaves} if 'head' in method else {}
  tree |= {'decoder': {'layers': {'self': {'q': leaves}}}}
  adapter = AdapterWeights(method, tree)
  with pytest.raises(CheckpointError, match=f'cannot represent .*{message}'):
    peft.check(config, adapter)


def test_xlora_of_peft_is_refused_with_advice(tmp_path):
  fields = {'peft_type': 'XLORA', 'adapters': {}}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(fields))
  with pytest.raises(CheckpointError, match=r'XLORA.*train xlora\(from_adapt'):
    peft.load(str(tmp_path), small_decoders.CONFIGS['llama'])
