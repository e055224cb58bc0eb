# SPDX-License-Identifier: Apache-2.0
"""Answers with a draft model are those without, in fewer steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference import loaded_model
from moepeft.inference.api import FAILED, Token
from moepeft.inference.engine.draft_model import Draft
from moepeft.inference.generator import GenerationConfig, Generator
from moepeft.inference.sampling import Sampling
from moepeft.models.decoder.model import Decoder

from ...contracts import small_decoders
from ...serve.small_server import byte_tokenizer
from .. import engines
from .test_prompt_lookup import CONFIG, answers, engine, requests


def base_draft(**changes):
  """The base of `engine` without its adapter; other weights with `changes`."""
  config = dataclasses.replace(engines.CONFIG, **changes)
  model, variables = small_decoders.make(config)
  return Draft(model, variables['params'])


def test_answers_are_those_without_a_draft():
  asked = requests()
  subject = engine(draft=base_draft(), num_assistant_tokens=4)
  assert answers(subject, asked) == answers(engine(), asked)
  stats = subject.stats()
  # The draft lacks the adapter, so that some of its proposals are wrong.
  assert 0 < stats.accepted_tokens < stats.proposed_tokens


def test_a_draft_that_is_the_model_is_always_right():
  asked = requests()
  model, variables = small_decoders.make(engines.CONFIG)
  draft = Draft(model, variables['params'])
  config = GenerationConfig(20, (), num_assistant_tokens=4)
  prompts = [r.prompt_ids for r in asked]
  plain = Generator(model, variables, None, GenerationConfig(20, ()))
  subject = Generator(model, variables, None, config, draft=draft)
  assert subject.generate_ids(prompts) == plain.generate_ids(prompts)
  (used,) = subject._engines
  stats = used.stats()
  # 20 tokens in 4 steps of 5, of which 4 are proposed.
  assert stats.accepted_tokens == stats.proposed_tokens == 4 * 16


def test_a_draft_may_be_another_model_shorter_and_scanned():
  asked = requests()
  draft = base_draft(layers=1, d_model=7, length=26)
  subject = engine(draft=draft, num_assistant_tokens=3, scan=True)
  assert answers(subject, asked) == answers(engine(scan=True), asked)
  # The longest prompt has 24 tokens, so that the draft ends before its answer.
  assert 0 < subject.stats().proposed_tokens


def test_samples_and_logprobs_are_those_without_a_draft():
  sampling = Sampling(temperature=0.3, repetition_penalty=1.1)
  asked = requests(sampling=sampling, seed=5, logprobs=2)[:2]

  def tokens(engine):
    events = [event for _, event in engine.stream(asked)]
    return [event.token for event in events if isinstance(event, Token)]

  subject = engine(draft=base_draft(), num_assistant_tokens=3)
  actual, expected = (
    sorted(tokens(e), key=lambda t: (t.id, t.logprob))
    for e in (subject, engine())
  )
  assert [t.id for t in actual] == [t.id for t in expected]
  np.testing.assert_allclose(
    [t.logprob for t in actual], [t.logprob for t in expected], atol=1e-5
  )
  assert subject.stats().accepted_tokens


def test_a_draft_of_nan_fails_the_request_and_says_so():
  draft = base_draft()
  broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), draft.params)
  draft = dataclasses.replace(draft, params=broken)
  subject = engine(draft=draft, num_assistant_tokens=3)
  (answer,) = subject.generate(requests()[:1])
  assert answer.finished.reason == FAILED
  assert 'the draft model failed' in answer.finished.message


def test_settings_that_do_not_go_together_are_refused():
  with pytest.raises(ValueError, match='go together'):
    engine(num_assistant_tokens=3)
  with pytest.raises(ValueError, match='go together'):
    engine(draft=base_draft())
  with pytest.raises(ValueError, match='set one of'):
    dataclasses.replace(
      CONFIG, num_assistant_tokens=3, prompt_lookup_num_tokens=3
    )
  with pytest.raises(ValueError, match='from 0 to 7; got 8'):
    dataclasses.replace(CONFIG, num_assistant_tokens=8)


def test_an_encoder_decoder_is_no_draft():
  with pytest.raises(ValueError, match='is an encoder-decoder'):
    loaded_model.load_draft('package:t5_tiny', ByteTokenizer())


def test_a_draft_has_the_tokens_of_the_model(tmp_path, monkeypatch):
  words = byte_tokenizer(tmp_path)
  loaded = dataclasses.replace(
    loaded_model.load_model('package:t5_tiny'),
    model=Decoder(engines.CONFIG),
    tokenizer=words,
  )
  monkeypatch.setattr(loaded_model, 'load_model', lambda path: loaded)
  assert loaded_model.load_draft('small', words).model is loaded.model
  with pytest.raises(ValueError, match="tokens of --assistant_model='small'"):
    loaded_model.load_draft('small', ByteTokenizer())
