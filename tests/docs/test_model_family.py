# SPDX-License-Identifier: Apache-2.0
"""The family of docs/extending/model_family.md against `transformers`."""

import importlib

import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.models import FAMILIES

from .test_extending import FOLDER, execute
from .test_extending import directory as directory


@pytest.mark.parametrize(
  ('bias', 'tied'),
  [
    (True, False),
    *(
      pytest.param(*flags, marks=pytest.mark.slow)
      for flags in ((True, True), (False, True), (False, False))
    ),
  ],
)
def test_the_example_has_the_logits_of_transformers(directory, bias, tied):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  execute(FOLDER / 'model_family.md', directory)
  importlib.import_module('starcoder2')
  torch.manual_seed(0)
  # 2 * 3 heads of 8 beside a width of 48; 23 tokens, longer than the window.
  reference = transformers.Starcoder2ForCausalLM(
    transformers.Starcoder2Config(
      vocab_size=61,
      hidden_size=48,
      intermediate_size=53,
      num_hidden_layers=3,
      num_attention_heads=6,
      num_key_value_heads=2,
      max_position_embeddings=64,
      rope_parameters={'rope_type': 'default', 'rope_theta': 700.0},
      sliding_window=5,
      norm_epsilon=1e-3,
      use_bias=bias,
      tie_word_embeddings=tied,
    )
  ).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.2 * torch.randn(parameter.shape))
  reference.save_pretrained(directory / 'reference')
  ids = np.random.default_rng(0).integers(0, 61, (2, 23))
  with torch.no_grad():
    expected = reference(torch.tensor(ids)).logits.numpy()

  loaded = hf.load(str(directory / 'reference'))
  assert (loaded.config.tied, loaded.config.mlp_bias) == (tied, bias)
  model = FAMILIES['starcoder2'].module(loaded.config)
  logits = model.apply({'params': loaded.params}, {'inputs': ids})
  # Sums of 50 products through 3 layers, in another order.
  atol = 2e-5 * np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)

  hf.save(str(directory / 'ours'), loaded.config, loaded.params)
  again = transformers.AutoModelForCausalLM.from_pretrained(directory / 'ours')
  with torch.no_grad():
    logits = again.eval()(torch.tensor(ids)).logits.numpy()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
