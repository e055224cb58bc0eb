# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning and P-tuning of `peft`: in to its logits, out to where it reads
them, or refused in a sentence."""

import jax
import numpy as np
import pytest

from moepeft.checkpoints.adapter import AdapterWeights, folded
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import FAMILIES
from moepeft.models.decoder.model import Decoder
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build

from .test_peft_decoders import IDS, base, shaken, torch_logits
from .test_peft_prompts import TARGETS, logits_of, ours, t5


def adapted(kind, folder, config, length=3, **options):
  """Saves a model and a random adapter; the logits of both, and the model's."""
  reference = pytest.importorskip('peft')
  model = t5() if kind == 'T5' else base(kind)
  model.save_pretrained(folder / 'base')
  plain = logits_of(model, kind)
  task = 'SEQ_2_SEQ_LM' if kind == 'T5' else 'CAUSAL_LM'
  config = getattr(reference, config)(
    task_type=task, num_virtual_tokens=length, **options
  )
  model = reference.get_peft_model(model, config).eval()
  trained = [p for p in model.parameters() if p.requires_grad]
  shaken(trained, model, 0.5)
  model.save_pretrained(folder / 'adapter')
  return logits_of(model, kind), plain


def logits(loaded, adapter):
  family = FAMILIES[loaded.config.family]
  adapter_map = build(adapter.method, family.sites(loaded.config)).adapter_map
  model = Decoder(loaded.config, adapter_map)
  variables = {'params': loaded.params, 'peft': adapter.tree}
  return np.asarray(jax.jit(model.apply)(variables, {'inputs': IDS}))


@pytest.mark.parametrize(
  ('kind', 'options'),
  [
    ('Llama', {}),
    # An MLP computes the keys and values, and the file has the result.
    pytest.param(
      'Qwen3',
      {'prefix_projection': True, 'encoder_hidden_size': 5},
      marks=pytest.mark.slow,
    ),
    pytest.param('Gemma', {}, marks=pytest.mark.slow),
  ],
)
def test_prefixes_of_peft_come_in_and_go_out(kind, options, tmp_path):
  # Unlike the number of layers, which is 3.
  expected, plain = adapted(kind, tmp_path, 'PrefixTuningConfig', 5, **options)
  loaded = hf.load(str(tmp_path / 'base'), 'float32')
  adapter = peft.load(str(tmp_path / 'adapter'), loaded.config)
  assert adapter.method == 'prefix(length=5)'
  actual = logits(loaded, adapter)
  # Sums of tens of products through 3 layers.
  limit = 2e-5 * np.abs(expected).max()
  assert np.abs(actual - expected).max() < limit
  assert np.abs(plain - expected).max() > 100 * limit
  peft.save(tmp_path / 'again', loaded.config, adapter, loaded.path)
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('peft')
  model = transformers.AutoModelForCausalLM.from_pretrained(loaded.path)
  model = reference.PeftModel.from_pretrained(model, tmp_path / 'again').eval()
  assert np.abs(torch_logits(model) - expected).max() < limit


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'options'),
  [
    ('Llama', {}),
    ('Llama', {'encoder_reparameterization_type': 'LSTM'}),
    ('T5', {'num_transformer_submodules': 1}),
  ],
)
def test_p_tuning_of_peft_comes_in_as_a_prompt(kind, options, tmp_path):
  expected, plain = adapted(
    kind, tmp_path, 'PromptEncoderConfig', encoder_hidden_size=5, **options
  )
  _, adapter, actual = ours(tmp_path)
  assert adapter.method == 'prompt(length=3)'
  limit = 2e-5 * np.abs(expected).max()
  assert np.abs(actual - expected).max() < limit
  assert np.abs(plain - expected).max() > 100 * limit


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'sentence'),
  [
    ('GPT2', 'peft moves the positions'),
    ('T5', 'peft moves the positions'),
    ('Mistral', "model's window of attention hides a prefix"),
  ],
)
def test_a_prefix_without_an_equivalent_is_refused(kind, sentence, tmp_path):
  # peft takes the width of a T5's heads from that of the model.
  options = {'token_dim': 20} if kind == 'T5' else {}
  adapted(kind, tmp_path, 'PrefixTuningConfig', **options)
  config = hf.load(str(tmp_path / 'base')).config
  with pytest.raises(CheckpointError, match=sentence):
    peft.load(str(tmp_path / 'adapter'), config)
  with pytest.raises(CheckpointError, match=sentence):
    peft.save(tmp_path / 'b', config, AdapterWeights('prefix(length=3)', {}))


@pytest.mark.slow
def test_without_a_relative_bias_a_t5s_prefix_in_peft_is_that_of_its_decoder(
  tmp_path,
):
  """T5's bias is the difference: transformers adds it to a prefix's logits.

  peft gives the encoder no prefix, and lays the arrays [r, 2 l, n, h] of l
  layers twice behind each other: layer i has the keys 4 i and the values
  4 i + 1 of them, modulo 2 l.
  """
  torch = pytest.importorskip('torch')
  reference = pytest.importorskip('peft')
  model = t5()
  with torch.no_grad():
    for stack in (model.encoder, model.decoder):
      attention = stack.block[0].layer[0].SelfAttention
      attention.relative_attention_bias.weight.zero_()
  model.save_pretrained(tmp_path / 'base')
  plain = logits_of(model, 'T5')
  config = reference.PrefixTuningConfig(
    task_type='SEQ_2_SEQ_LM', num_virtual_tokens=3, token_dim=20
  )
  model = reference.get_peft_model(model, config).eval()
  expected = logits_of(model, 'T5')
  loaded = hf.load(str(tmp_path / 'base'), 'float32')
  vectors = model.prompt_encoder['default'].embedding.weight.detach().numpy()
  # Two layers, five heads of four.
  vectors = vectors.reshape(3, 4, 5, 4).swapaxes(0, 1)
  tree = {'k': vectors[[0, 0]], 'v': vectors[[1, 1]]}
  tree = {'decoder': {'layers': {'self': {'core': {'prefix': tree}}}}}
  method = "prefix(length=3, targets='decoder/self/core')"
  family = FAMILIES['t5']
  adapter_map = build(method, family.sites(loaded.config)).adapter_map
  model = family.module(loaded.config, adapter_map)
  variables = {'params': loaded.params, 'peft': tree}
  batch = {'inputs': IDS, 'decoder_inputs': TARGETS}
  actual = np.asarray(jax.jit(model.apply)(variables, batch))
  limit = 2e-5 * np.abs(expected).max()
  assert np.abs(actual - expected).max() < limit
  assert np.abs(plain - expected).max() > 100 * limit


@pytest.mark.slow
def test_an_untrained_prefix_of_zeros_is_refused(tmp_path):
  reference = pytest.importorskip('peft')
  base('Llama').save_pretrained(tmp_path / 'base')
  config = reference.PrefixTuningConfig(
    task_type='CAUSAL_LM', num_virtual_tokens=5, init_weights='zero'
  )
  model = reference.get_peft_model(base('Llama'), config)
  model.save_pretrained(tmp_path / 'adapter')
  config = hf.load(str(tmp_path / 'base')).config
  with pytest.raises(CheckpointError, match='holds vectors of zeros'):
    peft.load(str(tmp_path / 'adapter'), config)


@pytest.mark.slow
def test_mlps_compute_what_those_of_peft_compute():
  torch = pytest.importorskip('torch')
  reference = pytest.importorskip('peft')
  sizes = {'num_virtual_tokens': 3, 'num_layers': 2, 'num_attention_heads': 2}
  sizes |= {'token_dim': 8, 'encoder_hidden_size': 5}
  torch.manual_seed(0)
  encoder = reference.PrefixEncoder(
    reference.PrefixTuningConfig(
      prefix_projection=True, num_transformer_submodules=1, **sizes
    )
  )
  arrays = {k: a.detach().numpy() for k, a in encoder.named_parameters()}
  # [m, l, k or v, heads, h]; all layers share E and D there.
  up = arrays['transform.2.weight'].T.reshape(5, 2, 2, 2, 4)
  bias = arrays['transform.2.bias'].reshape(2, 2, 2, 4)
  shared = {
    'embedding': arrays['embedding.weight'],
    'down': arrays['transform.0.weight'].T,
    'down_bias': arrays['transform.0.bias'],
  }
  tree = {name: np.stack([a, a]) for name, a in shared.items()}
  for i, name in enumerate('kv'):
    tree |= {f'up_{name}': up[:, :, i].swapaxes(0, 1)}
    tree |= {f'bias_{name}': bias[:, i]}
  tree = {'decoder': {'layers': {'self': {'core': {'prefix': tree}}}}}
  actual = folded(AdapterWeights('prefix(length=3, hidden=5)', tree)).tree
  actual = actual['decoder']['layers']['self']['core']['prefix']
  expected = encoder(torch.arange(3)).detach().numpy().reshape(3, 2, 2, 2, 4)
  for i, name in enumerate('kv'):
    np.testing.assert_allclose(
      actual[name], expected[:, :, i].swapaxes(0, 1), rtol=1e-5, atol=1e-6
    )

  encoder = reference.PromptEncoder(
    reference.PromptEncoderConfig(num_transformer_submodules=1, **sizes)
  )
  arrays = {k: a.detach().numpy() for k, a in encoder.named_parameters()}
  tree = {'embedding': arrays['embedding.weight']}
  for i in range(3):
    tree[f'kernel_{i}'] = arrays[f'mlp_head.{2 * i}.weight'].T
    tree[f'bias_{i}'] = arrays[f'mlp_head.{2 * i}.bias']
  tree = {'embed': {'p_tuning': tree}}
  actual = folded(AdapterWeights('p_tuning(length=3, hidden=5)', tree)).tree
  np.testing.assert_allclose(
    actual['embed']['prompt']['vectors'],
    encoder(torch.arange(3)).detach().numpy(),
    rtol=1e-5,
    atol=1e-6,
  )
