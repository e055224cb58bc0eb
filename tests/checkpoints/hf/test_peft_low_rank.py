# SPDX-License-Identifier: Apache-2.0
"""VeRA, LoHa and LoKr of peft are read as LoRA; VeRA is written and read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moepeft.checkpoints.adapter import AdapterWeights
from moepeft.checkpoints.hf import model as hf
from moepeft.checkpoints.hf import peft
from moepeft.models import weight_mapping
from moepeft.models.weight_mapping import CheckpointError
from moepeft.peft.method_text import canonical_text

from ..cases import CONFIGS, adapter_tree
from .test_peft import CONFIG, INPUTS, OUTPUTS, PARAMS, logits

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
reference = pytest.importorskip('peft')


def forms():
  return {
    'vera': reference.VeraConfig(r=4, projection_prng_key=7),
    # The matrices are drawn again from the seed.
    'vera-drawn': reference.VeraConfig(
      r=4, projection_prng_key=7, save_projection=False
    ),
    'loha': reference.LoHaConfig(r=3, alpha=5),
    # Of one factor whole and the other low-rank, or of both whole.
    'lokr': reference.LoKrConfig(r=2, alpha=5, decompose_factor=3),
    'lokr-low': reference.LoKrConfig(r=1, alpha=5, decompose_both=True),
  }


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  path = tmp_path_factory.mktemp('base')
  hf.save(path, CONFIG, PARAMS)
  return path


def torch_model(base):
  return transformers.T5ForConditionalGeneration.from_pretrained(base)


def torch_logits(model):
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(INPUTS), decoder_input_ids=torch.tensor(OUTPUTS)
    ).logits.numpy()


def assert_close(actual, expected):
  # Sums of tens of float32 products, in another order.
  tolerance = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
  assert np.abs(logits(None) - expected).max() > 100 * tolerance


@pytest.mark.parametrize(
  'form',
  [
    'vera-drawn',
    'loha',
    *(
      pytest.param(form, marks=pytest.mark.slow)
      for form in ('vera', 'lokr', 'lokr-low')
    ),
  ],
)
def test_an_adapter_of_peft_computes_the_same_as_a_lora(form, base, tmp_path):
  config = forms()[form]
  # Modules of unlike sizes, that are not all square.
  config.target_modules = ['q', 'wo']
  model = reference.get_peft_model(torch_model(base), config).eval()
  generator = torch.Generator().manual_seed(1)
  for name, weight in model.named_parameters():
    if weight.requires_grad:
      assert 'vera' in name or 'hada' in name or 'lokr' in name
      weight.data.normal_(std=0.3, generator=generator)
  model.save_pretrained(tmp_path)
  loaded = peft.load(str(tmp_path), CONFIG)
  assert loaded.method.startswith('lora(')
  assert_close(logits(loaded), torch_logits(model))


@pytest.mark.slow
def test_a_pruned_adalora_is_a_lora_of_what_is_left(base, tmp_path):
  config = reference.AdaLoraConfig(
    init_r=4,
    target_r=1,
    lora_alpha=5,
    tinit=1,
    tfinal=1,
    total_step=4,
    target_modules=['q', 'wo'],
  )
  model = reference.get_peft_model(torch_model(base), config)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
  tokens = {'input_ids': INPUTS, 'decoder_input_ids': OUTPUTS}
  tokens = {name: torch.tensor(ids) for name, ids in tokens.items()}
  generator = torch.Generator().manual_seed(1)
  for weight in model.parameters():
    if weight.requires_grad:
      weight.data.normal_(std=0.5, generator=generator)
  for step in range(4):
    loss = model(**tokens, labels=tokens['decoder_input_ids']).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
  model.save_pretrained(tmp_path)
  stored = load_file(tmp_path / peft.WEIGHTS_FILE)
  ranks = [len(a) for name, a in stored.items() if name.endswith('lora_E')]
  assert min(ranks) == 0 and max(ranks) > 1
  loaded = peft.load(str(tmp_path), CONFIG)
  saved = reference.PeftModel.from_pretrained(torch_model(base), tmp_path)
  assert_close(logits(loaded), torch_logits(saved.eval()))


VERA = AdapterWeights(
  "vera(rank=7, seed=5, targets='encoder/self/q|decoder/mlp/wo')",
  adapter_tree(
    CONFIG,
    {'vera/d': 'r', 'vera/b': '{out}'},
    ['encoder/self/q', 'decoder/mlp/wo'],
  ),
)


def test_a_vera_is_written_with_its_matrices(base, tmp_path):
  peft.save(tmp_path / 'a', CONFIG, VERA)
  expected = logits(VERA)
  model = reference.PeftModel.from_pretrained(torch_model(base), tmp_path / 'a')
  assert_close(torch_logits(model.eval()), expected)
  # Read back, it is a VeRA of the same seed.
  loaded = peft.load(str(tmp_path / 'a'), CONFIG)
  assert canonical_text(loaded.method) == canonical_text(VERA.method)
  read, written = map(weight_mapping.flatten, (loaded.tree, VERA.tree))
  assert read.keys() == written.keys()
  for path, array in written.items():
    # d is scaled by a number and by its inverse.
    np.testing.assert_allclose(read[path], array, rtol=1e-6)
  peft.save(tmp_path / 'b', CONFIG, loaded)
  # Matrices of another seed are no VeRA of this one, but a LoRA.
  other = edited(tmp_path / 'c', projection_prng_key=6)
  loaded = peft.load(other, CONFIG)
  assert loaded.method.startswith('lora(')
  assert_close(logits(loaded), expected)


def edited(path, **changes):
  peft.save(path, CONFIG, VERA)
  file = path / peft.CONFIG_FILE
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  return str(path)


def test_what_is_no_such_adapter_is_refused(tmp_path):
  wider = CONFIGS['gated-untied'].__class__(**(vars(CONFIG) | {'heads': 2}))
  with pytest.raises(CheckpointError, match='no VERA of this model .* outputs'):
    peft.load(edited(tmp_path / 'a'), wider)
  with pytest.raises(CheckpointError, match='another projection_prng_key'):
    peft.load(edited(tmp_path / 'b', projection_prng_key=-1), CONFIG)
  path = edited(tmp_path / 'c')
  file = tmp_path / 'c' / peft.WEIGHTS_FILE
  arrays = load_file(file)
  save_file({n: a for n, a in arrays.items() if 'lambda_d' not in n}, file)
  with pytest.raises(CheckpointError, match='vera_lambda_d'):
    peft.load(path, CONFIG)
