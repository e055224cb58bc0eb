# SPDX-License-Identifier: Apache-2.0
"""Answers with proposed tokens are those without, in fewer steps."""

import dataclasses

import numpy as np
import pytest

from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import LENGTH, STOP, Request, Token
from moepeft.inference.engine import prompt_lookup
from moepeft.inference.engine.engine import Engine
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.sampling import Sampling
from moepeft.models.decoder.model import Decoder, sites
from moepeft.nn.initializers import init_params
from moepeft.peft import build

from ...contracts import small_decoders
from .. import engines
from ..engines import prompt

CONFIG = EngineConfig(
  slots=3,
  max_model_len=engines.LENGTH,
  chunk=8,
  min_chunk=8,
  cache_lens=(engines.LENGTH,),
  batch_sizes=(3,),
  compile_ahead=False,
)
METHODS = (
  engines.METHOD,
  # Routers that read the prompt, and a first pass of the base alone.
  'molora(experts=3, rank=2, router=sentence)',
  "molora(experts=3, rank=2, reads='first_pass')",
)


def engine(method=engines.METHOD, count=0, draft=None, **changes):
  _, variables = small_decoders.make(engines.CONFIG)
  model = Decoder(
    engines.CONFIG, build(method, sites(engines.CONFIG)).adapter_map
  )
  params = variables['params']
  batch = small_decoders.batch()
  batch['targets_mask'] = batch['inputs_mask']
  peft = init_params(model, batch, 3, params)['peft']
  adapter = FixedAdapter(model, engines.moved(peft, 0))
  changes = {'prompt_lookup_num_tokens': count, **changes}
  config = dataclasses.replace(CONFIG, **changes)
  return Engine(model, params, adapter, config, draft=draft)


def requests(new=20, **options):
  return [
    Request(f'r{i}', prompt(i, size) * 2, new, **options)
    for i, size in enumerate((5, 9, 3, 12))
  ]


def answers(engine, requests):
  return [c.ids for c in engine.generate(requests)]


def oracle(monkeypatch, expected, wrong=()):
  """Proposes the answers themselves, with wrong tokens at some positions."""
  prompts = {r.prompt_ids: ids for r, ids in expected}

  def propose(ids, count):
    for prompt_ids, answer in prompts.items():
      if tuple(ids[: len(prompt_ids)]) == prompt_ids:
        begin = len(ids) - len(prompt_ids)
        tokens = answer[begin : begin + count]
        return tuple(
          (token + 1) % engines.V if begin + i in wrong else token
          for i, token in enumerate(tokens)
        )
    return ()

  monkeypatch.setattr(prompt_lookup, 'propose', propose)


@pytest.mark.parametrize(
  ('ids', 'count', 'proposed'),
  [
    # The latest of the longest.
    ((1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3), 2, (5, 1)),
    # Three tokens before two that are nearer.
    ((9, 2, 3, 4, 8, 2, 3, 7, 9, 2, 3), 4, (4, 8, 2, 3)),
    ((6, 2, 3, 4, 2, 3), 9, (4, 2, 3)),
    ((1, 1, 1), 3, (1,)),
    ((1, 2, 3, 4), 3, ()),
    ((1, 2), 3, ()),
  ],
)
def test_what_followed_the_longest_ngram_is_proposed(ids, count, proposed):
  assert prompt_lookup.propose(ids, count) == proposed


@pytest.mark.parametrize('method', METHODS)
def test_accepted_proposals_are_the_answer(monkeypatch, method):
  asked = requests()
  expected = answers(engine(method), asked)
  pairs = list(zip(asked, expected, strict=True))
  subject = engine(method, count=4)
  oracle(monkeypatch, pairs)
  assert answers(subject, asked) == expected
  # 20 tokens in 4 steps of 5, of which 4 are proposed.
  first = subject.stats()
  assert first.accepted_tokens == first.proposed_tokens == 4 * 16
  # Again, with prompts and answers in the cache.
  oracle(monkeypatch, pairs, wrong=(3, 4, 9, 15))
  assert answers(subject, asked) == expected
  second = subject.stats()
  accepted = second.accepted_tokens - first.accepted_tokens
  assert 0 < accepted < second.proposed_tokens - first.proposed_tokens


@pytest.mark.parametrize('scan', [False, True])
def test_answers_are_the_same_with_what_precedes(scan):
  asked = requests(new=22)
  subject = engine(count=5, scan=scan)
  assert answers(subject, asked) == answers(engine(scan=scan), asked)
  stats = subject.stats()
  assert 0 < stats.accepted_tokens <= stats.proposed_tokens


@pytest.mark.parametrize(
  'sampling',
  [
    Sampling(temperature=0.9, top_k=20, repetition_penalty=1.3),
    Sampling(
      temperature=0.9,
      frequency_penalty=0.5,
      presence_penalty=1.5,
      logit_bias=((3, 2.0), (5, -100.0)),
    ),
    Sampling(frequency_penalty=1.5),
  ],
  ids=['repetition', 'counts', 'greedy'],
)
def test_samples_penalties_and_logprobs_are_the_same(monkeypatch, sampling):
  asked = requests(sampling=sampling, seed=5, logprobs=2)
  plain = engine()
  expected = answers(plain, asked)
  oracle(monkeypatch, list(zip(asked, expected, strict=True)), (2, 7))
  subject = engine(count=3)

  def tokens(engine):
    return [
      event.token
      for _, event in engine.stream(asked[:1])
      if isinstance(event, Token)
    ]

  got, wanted = tokens(subject), tokens(plain)
  assert [t.id for t in got] == [t.id for t in wanted]
  np.testing.assert_allclose(
    [t.logprob for t in got], [t.logprob for t in wanted], atol=1e-5
  )
  assert [[i for i, _ in t.top] for t in got] == [
    [i for i, _ in t.top] for t in wanted
  ]
  assert subject.stats().accepted_tokens


def test_an_answer_ends_within_a_step(monkeypatch):
  asked = requests()
  expected = answers(engine(), asked)
  oracle(monkeypatch, list(zip(asked, expected, strict=True)))
  ends = (expected[0][6],)
  first = expected[0].index(ends[0])
  subject = engine(count=4)
  (stopped,) = subject.generate(
    [dataclasses.replace(asked[0], eos_token_ids=ends)]
  )
  assert stopped.ids == expected[0][: first + 1]
  assert stopped.finished.reason == STOP
  (short,) = subject.generate([dataclasses.replace(asked[0], max_new_tokens=7)])
  assert short.ids == expected[0][:7] and short.finished.reason == LENGTH


def test_proposals_reach_the_end_of_the_cache(monkeypatch):
  ids = prompt(0, 20)
  asked = [Request('r', ids, engines.LENGTH - len(ids))]
  expected = answers(engine(), asked)
  oracle(monkeypatch, [(asked[0], expected[0])])
  assert answers(engine(count=7), asked) == expected


def test_an_encoder_decoder_refuses_proposals():
  from .test_inline import T5, small

  model, _ = small.make(T5)
  variables = small.variables(T5, noise=0.1)
  pool = FixedAdapter(model, variables['peft'])
  config = EngineConfig(
    max_model_len=16, compile_ahead=False, prompt_lookup_num_tokens=2
  )
  subject = Engine(model, variables['params'], pool, config)
  with pytest.raises(ValueError, match='decoder-only'):
    subject.generate([Request('r', (3, 4), 2)])


def test_more_proposals_than_the_cache_has_room_for_are_refused():
  with pytest.raises(ValueError, match='from 0 to 7; got 8'):
    dataclasses.replace(CONFIG, prompt_lookup_num_tokens=8)
