# SPDX-License-Identifier: Apache-2.0
"""Prompts that `peft` tunes: in to its logits and out to where it reads them,
or refused in a sentence."""

import jax
import numpy as np
import pytest

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import FAMILIES
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft import build
from moepeft.peft.prefix import model_prefix_ids

from .test_peft_decoders import IDS, shaken, torch_logits
from .test_peft_decoders import base as decoder_of

# Tokens are placed by number in GPT-2.
DECODERS = ('Llama', 'GPT2')
T5 = dict(
  vocab_size=29,
  d_model=12,
  d_kv=4,
  d_ff=13,
  num_heads=5,
  num_layers=2,
  feed_forward_proj='gated-gelu',
  tie_word_embeddings=False,
  dropout_rate=0.0,
)
TARGETS = np.random.default_rng(1).integers(2, 29, (2, 4))


def t5():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = transformers.T5Config(**T5, decoder_start_token_id=0)
  torch.manual_seed(3)
  model = transformers.T5ForConditionalGeneration(config).eval()
  return shaken(model.parameters(), model, 0.15)


def logits_of(model, kind):
  """Behind the prompt, where there is one."""
  if kind != 'T5':
    return torch_logits(model)[:, -IDS.shape[1] :]
  torch = pytest.importorskip('torch')
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(IDS), decoder_input_ids=torch.tensor(TARGETS)
    ).logits.numpy()


def adapted(kind, folder, **options):
  """Saves a model and a random prompt; the logits of both, and the model's."""
  model = t5() if kind == 'T5' else decoder_of(kind)
  model.save_pretrained(folder / 'base')
  plain = logits_of(model, kind)
  task = 'SEQ_2_SEQ_LM' if kind == 'T5' else 'CAUSAL_LM'
  reference = pytest.importorskip('peft')
  config = reference.PromptTuningConfig(
    task_type=task, num_virtual_tokens=3, **options
  )
  model = reference.get_peft_model(model, config).eval()
  trained = [p for p in model.parameters() if p.requires_grad]
  shaken(trained, model, 0.5)
  model.save_pretrained(folder / 'adapter')
  return logits_of(model, kind), plain


def ours(folder):
  """(the base, the adapter, the logits of both)."""
  loaded = hf.load(str(folder / 'base'), 'float32')
  adapter = peft.load(str(folder / 'adapter'), loaded.config)
  family = FAMILIES[loaded.config.family]
  adapter_map = build(adapter.method, family.sites(loaded.config)).adapter_map
  model = family.module(loaded.config, adapter_map)
  front = np.broadcast_to(np.array(model_prefix_ids(model)), (len(IDS), 3))
  batch = {'inputs': np.concatenate([front, IDS], axis=1)}
  if loaded.config.family == 't5':
    batch['decoder_inputs'] = TARGETS
  variables = {'params': loaded.params, 'peft': adapter.tree}
  logits = np.asarray(jax.jit(model.apply)(variables, batch))
  return loaded, adapter, logits[:, 0 if 'decoder_inputs' in batch else 3 :]


@pytest.mark.parametrize('kind', [*DECODERS, 'T5'])
def test_prompts_of_peft_come_in_and_go_out(kind, tmp_path):
  options = {'num_transformer_submodules': 1} if kind == 'T5' else {}
  expected, plain = adapted(kind, tmp_path, **options)
  loaded, adapter, actual = ours(tmp_path)
  assert adapter.method == 'prompt(length=3)'
  # Sums of tens of products through 3 layers.
  limit = 2e-5 * np.abs(expected).max()
  assert np.abs(actual - expected).max() < limit
  assert np.abs(plain - expected).max() > 100 * limit
  peft.save(tmp_path / 'again', loaded.config, adapter, loaded.path)
  auto = 'AutoModelForSeq2SeqLM' if kind == 'T5' else 'AutoModelForCausalLM'
  transformers = pytest.importorskip('transformers')
  reference = pytest.importorskip('peft')
  model = getattr(transformers, auto).from_pretrained(loaded.path)
  model = reference.PeftModel.from_pretrained(model, tmp_path / 'again').eval()
  assert np.abs(logits_of(model, kind) - expected).max() < limit


def test_a_prompt_of_the_decoder_too_is_refused(tmp_path):
  # What peft makes of an encoder-decoder where nothing is said.
  adapted('T5', tmp_path)
  with pytest.raises(CheckpointError, match='one of the decoder .*=2'):
    ours(tmp_path)


def test_a_prompt_of_a_model_that_scales_vectors_is_refused(tmp_path):
  adapted('Gemma', tmp_path)
  with pytest.raises(CheckpointError, match='version of transformers'):
    ours(tmp_path)
  shape = hf.load(str(tmp_path / 'base')).config
  tree = {'embed': {'prompt': {'vectors': np.zeros((3, 12), np.float32)}}}
  own = AdapterWeights('prompt(length=3)', tree)
  with pytest.raises(CheckpointError, match='write the moepeft format'):
    peft.save(tmp_path / 'again', shape, own)


def test_a_prompt_of_another_width_is_refused(tmp_path):
  adapted('Llama', tmp_path)
  transformers = pytest.importorskip('transformers')
  config = transformers.LlamaConfig(
    vocab_size=29, hidden_size=16, num_attention_heads=2, num_hidden_layers=1
  )
  transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / 'wide')
  shape = hf.load(str(tmp_path / 'wide')).config
  with pytest.raises(CheckpointError, match=r'\(3, 12\).*expected .*\(3, 16\)'):
    peft.load(str(tmp_path / 'adapter'), shape)


def test_a_prompt_beside_another_adapter_has_no_form_in_peft(tmp_path):
  adapted('Llama', tmp_path)
  loaded, adapter, _ = ours(tmp_path)
  both = adapter._replace(method='prompt(length=3) + lora')
  with pytest.raises(CheckpointError, match='one prompt or one prefix'):
    peft.save(tmp_path / 'again', loaded.config, both)


def test_any_command_reads_it(tmp_path):
  adapted('Llama', tmp_path)
  shape = hf.load(str(tmp_path / 'base')).config
  start = base_lib.load_adapter(str(tmp_path / 'adapter'), shape)
  assert start.method == 'prompt(length=3)' and start.sha256 == ''
