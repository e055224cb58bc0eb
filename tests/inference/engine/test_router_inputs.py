# SPDX-License-Identifier: Apache-2.0
"""Requests whose adapters route by the prompt, the task or a first pass."""

import jax
import numpy as np
import pytest

from moepeft.checkpoints.base import example_batch
from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import LogprobRequest, Request, RequestRefused
from moepeft.inference.beam_search import BeamConfig
from moepeft.models.decoder.model import Decoder, sites
from moepeft.nn.initializers import init_params
from moepeft.peft import build

from ...contracts import answers, small, small_decoders

CONFIG = small_decoders.CONFIGS['llama']
AT = "targets='*/q|*/wo'"
PROMPT = "molora(experts=3, rank=2, router=sentence, targets='*/q|*/wo')"
TASK = f"moelora(experts=3, rank=2, router=task(tasks=['a', 'b']), {AT})"
FIRST_PASS = f"molora(experts=3, rank=2, reads='first_pass', {AT})"
EMBEDDING = "molora(experts=2, rank=2, reads='embedding', embedding_size=3)"
KINDS = pytest.mark.parametrize('method', [PROMPT, TASK, FIRST_PASS])
IDS = (5, 6, 7, 8, 9, 10, 11, 12, 13)


def make(method):
  built = build(method, sites(CONFIG))
  model = Decoder(CONFIG, built.adapter_map)
  variables = init_params(model, example_batch(), 1)
  return model, small.moved(variables, 0.3, 2)


def expected_log_probs(model, variables, prompt, answer, task=0):
  """By one call without a cache."""
  logits = answers.uncached_logits(
    model, variables, prompt, answer[:-1], task=task
  )
  return np.asarray(jax.nn.log_softmax(logits))[range(len(answer)), answer]


@KINDS
def test_scores_of_a_given_answer_are_those_of_training(method):
  model, variables = make(method)
  engine = answers.make_engine(model, variables)
  tasks = ['a', 'b'] if method == TASK else ['']
  requests = [LogprobRequest(IDS, (3, 4, 9), task=task) for task in tasks]
  scores = engine.log_probs(requests)
  for i, score in enumerate(scores):
    np.testing.assert_allclose(
      score,
      expected_log_probs(model, variables, IDS, [3, 4, 9], task=i + 1),
      rtol=1e-5,
      atol=1e-5,
    )
  if method == TASK:
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


@KINDS
def test_a_prompt_that_continues_another_is_routed_as_its_own(method):
  """The slot of the first has a cache of another prompt or task."""
  model, variables = make(method)
  engine = answers.make_engine(model, variables, slots=1)
  prompts = [IDS[:5], IDS, IDS, IDS[:1]]
  tasks = ['a', 'a', 'b', 'b'] if method == TASK else [''] * 4
  requests = [
    Request(str(i), ids, 4, task=task, logprobs=0)
    for i, (ids, task) in enumerate(zip(prompts, tasks, strict=True))
  ]
  for request, answer in zip(requests, engine.generate(requests), strict=True):
    expected = expected_log_probs(
      *(model, variables, request.prompt_ids, answer.ids),
      task={'': 0, 'a': 1, 'b': 2}[request.task],
    )
    actual = [token.logprob for token in answer.tokens]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@KINDS
def test_beams_have_the_scores_of_their_answers(method):
  model, variables = make(method)
  engine = answers.make_engine(model, variables)
  task = 'b' if method == TASK else ''
  request = Request('0', IDS, 4, task=task)
  ((best, second),) = engine.beam_search([request], BeamConfig(2, 0.0))
  assert best.score > second.score
  for answer in (best, second):
    (score,) = engine.log_probs(
      [LogprobRequest(IDS, tuple(answer.ids), '', task)]
    )
    assert answer.score == pytest.approx(float(np.sum(score)), rel=1e-5)


def test_a_request_names_one_of_the_adapters_tasks():
  model, variables = make(TASK)
  engine = answers.make_engine(model, variables)
  for task in ('', 'c'):
    with pytest.raises(
      RequestRefused, match=f"by the task, .* one of a, b; got task='{task}'"
    ):
      engine.generate([Request('0', IDS, 1, task=task)])
  model, variables = make(PROMPT)
  engine = answers.make_engine(model, variables)
  with pytest.raises(RequestRefused, match="leave out task='a'"):
    engine.generate([Request('0', IDS, 1, task='a')])


def test_only_layers_cache_what_a_router_reads_of_the_prompt():
  method = 'molora(experts=2, rank=2, router=sentence, targets=head)'
  model, variables = make(method)
  with pytest.raises(ValueError, match="whole prompt at 'head'"):
    FixedAdapter(model, variables['peft'])


@pytest.mark.parametrize(
  'numbers, message',
  [
    ((), 'an embedding of 3 numbers; the request has 0 numbers'),
    ((1.0, 2.0), 'of 3 numbers; the request has 2'),
    ((1.0, 2.0, float('nan')), 'NaN or infinite'),
  ],
)
def test_a_request_has_an_embedding_of_the_adapters_size(numbers, message):
  model, variables = make(EMBEDDING)
  engine = answers.make_engine(model, variables)
  with pytest.raises(RequestRefused, match=message):
    engine.generate([Request('0', IDS, 1, embedding=numbers)])


def test_tasks_of_a_loss_alone_are_not_asked_for():
  method = (
    "loramoe(experts=4, rank=2, router=localized(tasks=['a', 'b'], "
    "group=['a'], delta=0.1))"
  )
  model, variables = make(method)
  engine = answers.make_engine(model, variables)
  (answer,) = engine.generate([Request('0', IDS, 2)])
  assert len(answer.ids) == 2
