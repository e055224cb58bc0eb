# SPDX-License-Identifier: Apache-2.0
"""Beams and greedy tokens are those of `transformers`, of T5 and a decoder."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.inference.beam_search import BeamConfig, search
from moepeft.inference.decode import How, advance, greedy, start
from moepeft.inference.sampling import Sampling
from moepeft.models import FAMILIES

LENGTH = 9
PROMPTS = ([5, 6, 7, 8, 9], [12, 13, 14])
SETTINGS = [
  BeamConfig(3),
  BeamConfig(2, early_stopping=True),
  BeamConfig(4, length_penalty=2.0, early_stopping='never'),
  BeamConfig(3, length_penalty=-0.5),
  BeamConfig(3, length_penalty=0.0, early_stopping='never'),
]


@functools.cache
def tiny(family):
  """A random model of transformers, sharp enough to end now and then."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  shared = dict(
    vocab_size=23, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False
  )
  if family == 't5':
    model = transformers.T5ForConditionalGeneration(
      transformers.T5Config(
        d_model=12,
        num_heads=3,
        d_kv=5,
        d_ff=17,
        num_layers=2,
        decoder_start_token_id=0,
        feed_forward_proj='gated-gelu',
        **shared,
      )
    )
  else:
    model = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        hidden_size=12,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        intermediate_size=17,
        num_hidden_layers=2,
        bos_token_id=None,
        **shared,
      )
    )
  with torch.no_grad():
    model.lm_head.weight.mul_(20 if family == 'llama' else 3)
    for name, weight in model.named_parameters():
      if weight.ndim == 2 and 'lm_head' not in name:
        weight.mul_(3)
  return model.eval()


@functools.cache
def ours(family, folder):
  tiny(family).save_pretrained(folder)
  loaded = hf.load(str(folder), dtype='float32')
  return FAMILIES[family].module(loaded.config), {'params': loaded.params}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return {name: tmp_path_factory.mktemp(name) for name in ('t5', 'llama')}


def batch(prompts, s=7):
  ids, mask = np.zeros((len(prompts), s), np.int32), []
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt
    mask.append(np.arange(s) < len(prompt))
  return {'inputs': ids, 'inputs_mask': np.array(mask)}


@functools.cache
def end(family, folder):
  """An id that the best beam says in its middle: it shall end there."""
  module, variables = ours(family, folder)
  ends = jnp.array([-1])
  tokens, _ = search(
    module, variables, batch(PROMPTS), ends, LENGTH, SETTINGS[0]
  )
  return int(tokens[0, 0, 4])


def theirs(model, prompt, beams, eos):
  import torch

  ids = torch.tensor([prompt])
  found = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    num_beams=beams.count,
    num_return_sequences=beams.count,
    length_penalty=beams.length_penalty,
    early_stopping=beams.early_stopping,
    max_new_tokens=LENGTH,
    do_sample=False,
    eos_token_id=eos,
    return_dict_in_generate=True,
    output_scores=True,
  )
  begin = 1 if model.config.is_encoder_decoder else len(prompt)
  tokens = found.sequences[:, begin:].numpy()
  whole = np.zeros((beams.count, LENGTH), int)
  whole[:, : tokens.shape[1]] = tokens
  # What follows an end is the end again, where padding is 0.
  whole[np.cumsum(whole == eos, axis=1) - (whole == eos) > 0] = 0
  return whole, found.sequences_scores.numpy()


@pytest.mark.parametrize('beams', SETTINGS, ids=str)
@pytest.mark.parametrize('family', ['t5', 'llama'])
def test_beams_are_those_of_transformers(family, beams, folders):
  model, folder = tiny(family), folders[family]
  module, variables = ours(family, folder)
  eos = end(family, folder)
  tokens, scores = search(
    module, variables, batch(PROMPTS), jnp.array([eos]), LENGTH, beams
  )
  ended = 0
  for i, prompt in enumerate(PROMPTS):
    expected, expected_scores = theirs(model, prompt, beams, eos)
    np.testing.assert_array_equal(tokens[i], expected)
    # Sums of a few float32 log-probabilities.
    np.testing.assert_allclose(scores[i], expected_scores, rtol=1e-4)
    ended += (expected == eos).any(axis=1).sum()
  # That of `end` does so before the last token.
  assert ended or beams != SETTINGS[0]


@pytest.mark.parametrize(
  'penalty, least', [(None, 0), (1.7, 0), (None, 7), (0.6, 6)]
)
@pytest.mark.parametrize('family', ['t5', 'llama'])
def test_greedy_tokens_are_those_of_transformers(
  family, penalty, least, folders
):
  torch = pytest.importorskip('torch')
  model, folder = tiny(family), folders[family]
  module, variables = ours(family, folder)
  eos = end(family, folder)
  how = How(
    Sampling(repetition_penalty=penalty),
    jnp.array([eos]),
    jnp.int32(least) if least else None,
  )
  rows = start(module, variables, batch(PROMPTS), how, LENGTH)
  tokens = np.asarray(advance(module, variables, rows, how, LENGTH).tokens)
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    ids = torch.tensor([prompt])
    found = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=LENGTH,
      min_new_tokens=least or None,
      repetition_penalty=penalty,
      do_sample=False,
      eos_token_id=eos,
    )
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    expected = found[0, begin:].tolist()
    assert row.tolist() == expected + [0] * (LENGTH - len(expected))
    assert len(expected) >= least


def test_one_beam_is_greedy_and_wider_ones_are_no_worse(folders):
  module, variables = ours('llama', folders['llama'])
  ends = jnp.array([-1])
  one, first = search(
    module, variables, batch(PROMPTS), ends, LENGTH, BeamConfig(1)
  )
  plain = greedy(module, variables, batch(PROMPTS), LENGTH, eos=-1)
  np.testing.assert_array_equal(one[:, 0], plain)
  _, wide = search(
    module, variables, batch(PROMPTS), ends, LENGTH, BeamConfig(5)
  )
  # Not so in general: a wide search may drop what a narrow one keeps.
  assert (wide[:, 0] >= first[:, 0] - 1e-6).all()


def test_a_search_is_a_rows_own_and_may_be_cut_short(folders):
  module, variables = ours('llama', folders['llama'])
  ends = jnp.array([end('llama', folders['llama'])])
  beams = SETTINGS[0]
  run = functools.partial(search, module, variables)
  tokens, scores = run(batch(PROMPTS), ends, LENGTH, beams)
  alone, own = run(batch(PROMPTS[1:]), ends, LENGTH, beams)
  np.testing.assert_array_equal(alone[0], tokens[1])
  np.testing.assert_allclose(own[0], scores[1], rtol=1e-5)
  short, _ = run(batch(PROMPTS), ends, LENGTH, beams, jnp.int32(4))
  exact, _ = run(batch(PROMPTS), ends, 4, beams)
  np.testing.assert_array_equal(short[:, :, :4], exact)
  assert not np.asarray(short)[:, :, 4:].any()


@pytest.mark.parametrize(
  'values, message',
  [((0,), 'beams is at least 1; got 0'), ((2, 1.0, 'no'), "got 'no'")],
)
def test_beams_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    BeamConfig(*values)
