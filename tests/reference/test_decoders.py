# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models against `transformers`' logits and greedy tokens.

Every case of MOEPEFT_FIXTURES' hf/* whose family is a decoder's.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.core.types import Context
from moepeft.models import by_model_type
from moepeft.models.decoder.model import Decoder

from . import cases

# Float32 on CPU: a sum of a few hundred products rounds by 1e-6.
LIMIT = 1e-5


def is_decoder(kind):
  family = by_model_type().get(kind)
  return family is not None and family.architecture == 'decoder'


def found():
  folders = sorted((cases.ROOT / 'hf').glob('*/config.json'))
  return [
    path.parent.name
    for path in folders
    if is_decoder(json.loads(path.read_text())['model_type'])
  ]


if not found():
  pytest.skip(
    f'no decoders among the reference cases at {cases.ROOT}: name their '
    'directory with MOEPEFT_FIXTURES',
    allow_module_level=True,
  )


@functools.cache
def loaded(name):
  folder = cases.ROOT / 'hf' / name
  model = hf.load(str(folder), dtype='float32')
  return model, dict(np.load(folder / 'expected.npz'))


def relative_error(ours, theirs):
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize('name', found())
def test_logits_at_real_tokens(name):
  base, expected = loaded(name)
  real = expected['inputs/attention_mask'].astype(bool)
  batch = {'inputs': expected['inputs/input_ids'], 'inputs_mask': real}
  logits = jax.jit(Decoder(base.config).apply)({'params': base.params}, batch)
  reference = expected['outputs/logits'][real]
  assert relative_error(np.asarray(logits)[real], reference) < LIMIT


@pytest.mark.parametrize('name', found())
def test_greedy_tokens_with_a_cache(name):
  base, expected = loaded(name)
  tokens = expected['outputs/greedy_tokens']
  # The first row's real tokens are the prompt.
  ids = expected['inputs/input_ids'][:1]
  prompt = int(expected['inputs/attention_mask'][0].sum())
  assert (tokens[0, :prompt] == ids[0, :prompt]).all()
  model = Decoder(base.config)

  @jax.jit
  def extend(cache, new, at):
    ctx = Context(
      token_mask=jnp.ones(new.shape, bool),
      positions=at + jnp.arange(new.shape[1])[None],
      decode=True,
      cache_length=tokens.shape[1],
    )
    variables = {'params': base.params, **cache}
    return model.apply(variables, new, ctx, method='extend', mutable=['cache'])

  logits, cache = extend({}, ids[:, :prompt], 0)
  made = list(ids[0, :prompt])
  while len(made) < tokens.shape[1]:
    made.append(int(jnp.argmax(logits[0, -1])))
    logits, cache = extend(cache, jnp.array([[made[-1]]]), len(made) - 1)
  # Up to the end of sequence, after which transformers pads.
  length = tokens.shape[1]
  ends = np.flatnonzero(tokens[0, prompt:] == base_eos(name))
  if len(ends):
    length = prompt + ends[0] + 1
  assert made[:length] == tokens[0, :length].tolist()


def base_eos(name):
  fields = json.loads((cases.ROOT / 'hf' / name / 'config.json').read_text())
  return fields.get('eos_token_id')
