# SPDX-License-Identifier: Apache-2.0
"""Beams and greedy tokens are those of `transformers`, of T5 and a decoder."""

import functools

import jax
import numpy as np
import pytest

from moepeft.checkpoints.hf import model as hf
from moepeft.inference.api import Request
from moepeft.inference.beam_search import BeamConfig
from moepeft.inference.sampling import Sampling
from moepeft.models import FAMILIES

from ..contracts import answers

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


@functools.cache
def shared_engine(family, folder):
  """For two searches with up to four beams at once."""
  return answers.make_engine(*ours(family, folder), slots=8)


def greedy(family, folder, **options):
  """The tokens of greedy answers to the prompts."""
  requests = [
    Request(str(i), tuple(ids), LENGTH, **options)
    for i, ids in enumerate(PROMPTS)
  ]
  engine = shared_engine(family, folder)
  return [answer.ids for answer in engine.generate(requests)]


def search(family, folder, beams, eos=-1, prompts=PROMPTS, count=LENGTH):
  """The answers to each prompt, best first."""
  requests = [
    Request(str(i), tuple(ids), count, eos_token_ids=(eos,))
    for i, ids in enumerate(prompts)
  ]
  return shared_engine(family, folder).beam_search(requests, beams)


@functools.cache
def end(family, folder):
  """An id in the middle of the best answer: it shall end there."""
  return search(family, folder, SETTINGS[0])[0][0].ids[4]


def theirs(model, prompt, beams, eos):
  import torch

  ids = torch.tensor([prompt])
  actual = model.generate(
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
  rows = actual.sequences[:, begin:].tolist()
  # What follows an end is the end again.
  rows = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
  return rows, actual.sequences_scores.numpy()


@pytest.mark.parametrize(
  ('family', 'beams'),
  [
    # Every setting with one family, and the first with the other.
    pytest.param(
      family,
      beams,
      id=f'{family}-{beams}',
      marks=pytest.mark.slow if family == 't5' and number else (),
    )
    for family in ('t5', 'llama')
    for number, beams in enumerate(SETTINGS)
  ],
)
def test_beams_are_those_of_transformers(family, beams, folders):
  model, folder = tiny(family), folders[family]
  eos = end(family, folder)
  ended = 0
  for prompt, actual in zip(
    PROMPTS, search(family, folder, beams, eos), strict=True
  ):
    expected, expected_scores = theirs(model, prompt, beams, eos)
    assert [answer.ids for answer in actual] == expected
    # Sums of a few float32 log-probabilities.
    scores = [answer.score for answer in actual]
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
    ended += sum(row[-1] == eos for row in expected)
  # That of `end` does so before the last token.
  assert ended or beams != SETTINGS[0]


@pytest.mark.parametrize(
  ('family', 'penalty', 'least'),
  [
    ('t5', 0.6, 6),
    ('llama', None, 0),
    ('llama', 1.7, 0),
    ('llama', None, 7),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('t5', None, 0),
        ('t5', 1.7, 0),
        ('t5', None, 7),
        ('llama', 0.6, 6),
      )
    ),
  ],
)
def test_greedy_tokens_are_those_of_transformers(
  family, penalty, least, folders
):
  torch = pytest.importorskip('torch')
  model, folder = tiny(family), folders[family]
  eos = end(family, folder)
  tokens = greedy(
    family,
    folder,
    sampling=Sampling(repetition_penalty=penalty),
    eos_token_ids=(eos,),
    min_new_tokens=least,
  )
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    ids = torch.tensor([prompt])
    actual = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=LENGTH,
      min_new_tokens=least or None,
      repetition_penalty=penalty,
      do_sample=False,
      eos_token_id=eos,
    )
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    expected = actual[0, begin:].tolist()
    assert row == expected and len(expected) >= least


def test_one_beam_is_greedy_and_wider_ones_are_no_worse(folders):
  folder = folders['llama']
  one = search('llama', folder, BeamConfig(1))
  assert [actual[0].ids for actual in one] == greedy('llama', folder)
  wide = search('llama', folder, BeamConfig(4))
  # Not so in general: a wide search may drop what a narrow one keeps.
  for first, best in zip(one, wide, strict=True):
    assert best[0].score >= first[0].score - 1e-6


def test_a_search_does_not_depend_on_searches_beside_it(folders):
  folder, beams = folders['llama'], SETTINGS[0]
  eos = end('llama', folder)
  # Of three, the third begins when the first has ended.
  prompts = (*PROMPTS, [7])
  together = search('llama', folder, beams, eos, prompts)
  for prompt, actual in zip(prompts, together, strict=True):
    (alone,) = search('llama', folder, beams, eos, [prompt])
    assert [a.ids for a in alone] == [a.ids for a in actual]
    np.testing.assert_allclose(
      [a.score for a in alone], [a.score for a in actual], rtol=1e-5
    )


def test_an_engine_is_idle_after_a_search(folders):
  module, variables = ours('llama', folders['llama'])
  engine = answers.make_engine(module, variables)
  requests = [Request('0', (5, 6, 7), LENGTH)]
  with pytest.raises(ValueError, match='5 beams need as many slots'):
    engine.beam_search(requests, BeamConfig(5))
  engine.beam_search(requests, BeamConfig(3))
  assert engine._core.scheduler.prefix_cache.free() == 4
  broken = jax.tree.map(lambda a: a * np.nan, variables['params'])
  engine.update_weights({'params': broken})
  with pytest.raises(ArithmeticError, match='NaN or infinite'):
    engine.beam_search(requests, BeamConfig(3))
  engine.update_weights(variables)
  # What was no number is gone from the slots.
  (answer,) = engine.generate(requests)
  assert answer.ids == answers.uncached_greedy(
    module, variables, (5, 6, 7), LENGTH
  )
  assert engine._core.scheduler.prefix_cache.free() == 4


@pytest.mark.parametrize(
  'values, message',
  [((0,), 'beams is at least 1; got 0'), ((2, 1.0, 'no'), "got 'no'")],
)
def test_beams_that_cannot_be_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    BeamConfig(*values)
