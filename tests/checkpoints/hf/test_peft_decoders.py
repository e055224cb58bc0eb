# SPDX-License-Identifier: Apache-2.0
"""Adapters that `peft` makes of decoders: in to its logits or refused in a
sentence, and out to where it reads them to the same logits."""

import jax
import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models.decoder.model import Decoder, sites
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build

IDS = np.random.default_rng(0).integers(2, 29, (2, 7))
SIZES = dict(
  vocab_size=29,
  hidden_size=12,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=4,
  intermediate_size=13,
  num_hidden_layers=3,
)
GPT2_SIZES = dict(vocab_size=29, n_embd=12, n_head=3, n_layer=2, n_positions=16)


def base(kind):
  """A random model, its weights so large that all of them matter."""
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  sizes = GPT2_SIZES if kind == 'GPT2' else SIZES
  config = getattr(transformers, f'{kind}Config')(**sizes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  return shaken(model.parameters(), model, 0.15)


def shaken(weights, model, size):
  torch = pytest.importorskip('torch')
  noise = torch.Generator().manual_seed(5)
  with torch.no_grad():
    for weight in weights:
      weight.add_(size * torch.randn(weight.shape, generator=noise))
  return model


def adapted(kind, config, folder, **saving):
  """A model with a random adapter, both saved; their logits, and a plain
  model's."""
  reference = pytest.importorskip('peft')
  model = base(kind)
  model.save_pretrained(folder / 'base')
  plain = torch_logits(model)
  name, options = config
  config = getattr(reference, name)(**options)
  model = reference.get_peft_model(model, config).eval()
  trained = [p for name, p in model.named_parameters() if p.requires_grad]
  shaken(trained, model, 0.3)
  model.save_pretrained(folder / 'adapter', **saving)
  return torch_logits(model), plain


def torch_logits(model):
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(input_ids=torch.tensor(IDS)).logits.numpy()


# (class, arguments): peft is imported by the tests, as it takes seconds.
def lora(**options):
  return 'LoraConfig', dict(r=3, lora_alpha=5, lora_dropout=0.1, **options)


def ia3(**options):
  return 'IA3Config', options


ATTENTION = ['q_proj', 'v_proj']
CASES = {
  'all-linear': ('Llama', lora(target_modules='all-linear')),
  'regex': (
    'Llama',
    lora(target_modules=r'.*layers\.[02]\..*\.(o_proj|up_proj)'),
  ),
  'layers': ('Qwen2', lora(target_modules=ATTENTION, layers_to_transform=[1])),
  'last-layer': (
    'Qwen3',
    lora(
      target_modules=['down_proj'],
      layers_to_transform=2,
      layers_pattern='layers',
    ),
  ),
  'excluded': (
    'Mistral',
    lora(target_modules='all-linear', exclude_modules=['o_proj']),
  ),
  'rslora': ('Gemma2', lora(target_modules=ATTENTION, use_rslora=True)),
  'dora': (
    'Llama',
    lora(target_modules=['k_proj', 'gate_proj'], use_dora=True),
  ),
  'dora-rslora': (
    'Qwen2',
    lora(target_modules=['q_proj'], use_dora=True, use_rslora=True),
  ),
  'conv1d': (
    'GPT2',
    lora(
      target_modules=['attn.c_proj', 'c_fc', 'mlp.c_proj'], fan_in_fan_out=True
    ),
  ),
  'conv1d-dora': (
    'GPT2',
    lora(target_modules=['c_fc'], fan_in_fan_out=True, use_dora=True),
  ),
  'ia3': (
    'Llama',
    ia3(
      target_modules=['k_proj', 'v_proj', 'down_proj'],
      feedforward_modules=['down_proj'],
    ),
  ),
  'ia3-biased': (
    'Qwen2',
    ia3(target_modules=['k_proj', 'up_proj'], feedforward_modules=['up_proj']),
  ),
  'ia3-some-layers': (
    'Gemma',
    ia3(
      target_modules=r'.*layers\.1\..*\.(v_proj|down_proj)',
      feedforward_modules=r'.*\.down_proj',
    ),
  ),
  'ia3-conv1d': (
    'GPT2',
    ia3(
      target_modules=['c_fc', 'mlp.c_proj'],
      feedforward_modules=['mlp.c_proj'],
      fan_in_fan_out=True,
    ),
  ),
}


def ours(folder):
  """(the base, the adapter, the logits of both)."""
  loaded = hf.load(str(folder / 'base'), 'float32')
  adapter = peft.load(str(folder / 'adapter'), loaded.config)
  adapter_map = build(adapter.method, sites(loaded.config)).adapter_map
  run = jax.jit(Decoder(loaded.config, adapter_map).apply)
  variables = {'params': loaded.params, 'peft': adapter.tree}
  return loaded, adapter, np.asarray(run(variables, {'inputs': IDS}))


@pytest.mark.parametrize('name', CASES)
def test_adapters_of_peft_come_in_and_go_out(name, tmp_path):
  kind, config = CASES[name]
  expected, plain = adapted(kind, config, tmp_path)
  loaded, adapter, actual = ours(tmp_path)
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


REFUSED = {
  'whole-modules': (
    'Llama',
    lora(target_modules=ATTENTION, modules_to_save=['lm_head']),
    '(modules_to_save), which is not supported',
  ),
  'biases': (
    'Qwen2',
    lora(target_modules=ATTENTION, bias='lora_only'),
    "sets bias='lora_only'",
  ),
  'lora-bias': (
    'Llama',
    lora(target_modules=ATTENTION, lora_bias=True),
    'sets lora_bias=True',
  ),
  'pissa': (
    'Llama',
    lora(target_modules=ATTENTION, init_lora_weights='pissa'),
    "sets init_lora_weights='pissa'",
  ),
  'tokens': (
    'Llama',
    lora(target_modules=ATTENTION, trainable_token_indices=[3]),
    'sets trainable_token_indices=',
  ),
  'fused': (
    'GPT2',
    lora(target_modules=['c_attn'], fan_in_fan_out=True),
    'are one module in Hugging Face, attn.c_attn',
  ),
  'some-layers-of-dora': (
    'Llama',
    lora(target_modules=ATTENTION, use_dora=True, layers_to_transform=[1]),
    'has no magnitude',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_read_is_one_sentence(name, tmp_path):
  kind, config, sentence = REFUSED[name]
  adapted(kind, config, tmp_path)
  with pytest.raises(CheckpointError) as error:
    ours(tmp_path)
  assert sentence in str(error.value)
  assert '\n' not in str(error.value)


def test_pickles_are_refused_by_name(tmp_path):
  config = lora(target_modules=ATTENTION)
  adapted('Llama', config, tmp_path)
  file = tmp_path / 'adapter' / peft.WEIGHTS_FILE
  file.rename(file.with_name('adapter_model.bin'))
  with pytest.raises(CheckpointError, match='adapter_model.bin, a pickle'):
    ours(tmp_path)
