# SPDX-License-Identifier: Apache-2.0
"""What an engine says is what the model says, whatever runs beside it."""

import numpy as np
import pytest

from moepeft.inference.adapters.fixed import FixedAdapter
from moepeft.inference.api import LENGTH, STOP, RequestRefused
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.sampling import Sampling
from moepeft.models.decoder.model import Decoder

from ...contracts import answers, small_decoders
from .. import engines
from ..engines import ask, decoder, expected, logprobs, prompt, running

# Float32 sums in another order: with values of about 3 and 40 terms some 1e-6.
CLOSE = 1e-5
SIZES = (11, 1, 4, 23, 2, 7, 16)
# top_k of 1 is greedy with draws; filters, penalties.
SETTINGS = (
  Sampling(),
  Sampling(temperature=0.9),
  Sampling(temperature=1.3, top_k=5, top_p=0.9),
  Sampling(temperature=0.7, min_p=0.1),
  Sampling(repetition_penalty=1.6),
)


def check(answer, ids, rows, top=3):
  """An answer's log-probabilities and alternatives are the model's.

  Args:
    rows: log-probabilities [t, v] by a whole call.
  """
  for i, token in enumerate(answer.scored):
    row = rows[len(ids) - 1 + i]
    assert abs(token.logprob - row[token.id]) < CLOSE
    best = np.sort(row)[::-1][:top]
    np.testing.assert_allclose([p for _, p in token.top], best, atol=CLOSE)
    for id, logprob in token.top:
      assert abs(row[id] - logprob) < CLOSE


@pytest.mark.parametrize('adapter', ['', 'one', 'two'])
def test_greedy_answers_and_log_probabilities_are_the_models(engine, adapter):
  asked = [
    (ids, ask(engine, ids, 6, adapter=adapter, logprobs=3))
    for ids in (prompt(i, size) for i, size in enumerate(SIZES))
  ]
  for ids, answer in asked:
    rows = expected((*ids, *answer.tokens), adapter)
    assert answer.tokens == rows[len(ids) - 1 : -1].argmax(-1).tolist()
    assert answer.end.reason == LENGTH and answer.end.answer == 6
    check(answer, ids, rows)


def test_repeated_tokens_are_penalized(engine):
  model, params, contents = decoder()
  variables = {'params': params, 'peft': contents['one']}
  sampling = Sampling(repetition_penalty=1.6)
  for i, size in enumerate((9, 3, 1, 6)):
    ids = prompt(20 + i, size)
    answer = ask(engine, ids, 6, adapter='one', sampling=sampling)
    assert answer.tokens == answers.uncached_greedy(
      model, variables, ids, 6, penalty=1.6
    )


def greedy(logits_after, count, edit):
  """Greedy tokens by whole calls; edit(logits, answer) is plain numpy."""
  answer = []
  for _ in range(count):
    answer.append(int(np.argmax(edit(logits_after(answer), answer))))
  return answer


@pytest.mark.parametrize(
  'values',
  [
    dict(frequency_penalty=0.75),
    dict(presence_penalty=1.5),
    dict(frequency_penalty=-1.0, presence_penalty=0.5),
    dict(logit_bias=((3, 4.0), (11, -100.0))),
    dict(
      repetition_penalty=1.6,
      frequency_penalty=0.5,
      presence_penalty=0.25,
      logit_bias=((3, 4.0), (5, 3.5), (7, 3.0)),
    ),
  ],
  ids=str,
)
def test_penalties_of_counts_and_a_bias_are_their_formulas(engine, values):
  model, params, contents = decoder()
  variables = {'params': params, 'peft': contents['one']}
  changed = False
  for i, size in enumerate((9, 3, 1)):
    ids = prompt(20 + i, size)

    def edit(logits, answer, ids=ids):
      logits = logits.copy()
      for token, number in values.get('logit_bias', ()):
        logits[token] += number
      for token in {*ids, *answer}:
        penalty = values.get('repetition_penalty', 1)
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
      # The answer's tokens alone count, and not the prompt's.
      for token in answer:
        logits[token] -= values.get('frequency_penalty', 0)
      for token in set(answer):
        logits[token] -= values.get('presence_penalty', 0)
      return logits

    def logits_after(answer, ids=ids):
      return answers.uncached_logits(model, variables, ids, answer)[-1]

    actual = ask(engine, ids, 8, adapter='one', sampling=Sampling(**values))
    assert actual.tokens == greedy(logits_after, 8, edit)
    plain = ask(engine, ids, 8, adapter='one')
    changed |= actual.tokens != plain.tokens
  assert changed


def test_log_probabilities_are_those_before_penalties(engine):
  ids = prompt(21, 5)
  s = Sampling(logit_bias=((3, 100.0),))
  answer = ask(engine, ids, 2, logprobs=0, sampling=s)
  assert answer.tokens == [3, 3]
  rows = expected((*ids, 3))[-2:]
  scores = [event.token.logprob for event in answer.events[:-1]]
  np.testing.assert_allclose(scores, rows[:, 3], atol=CLOSE)


class OddTokens:
  """A constraint that allows tokens of odd ids."""

  def mask(self):
    return np.arange(engines.V) % 2 == 1

  def accept(self, token):
    return False


def test_a_bias_does_not_overcome_a_constraint(engine):
  s = Sampling(logit_bias=((4, 100.0), (5, 90.0)), presence_penalty=2.0)
  answer = ask(engine, prompt(1, 4), 4, sampling=s, constraint=OddTokens())
  assert answer.tokens == [5] * 4
  s = Sampling(logit_bias=((4, 100.0),), frequency_penalty=2.0)
  answer = ask(engine, prompt(1, 4), 6, sampling=s, constraint=OddTokens())
  assert all(token % 2 for token in answer.tokens)
  assert len(set(answer.tokens)) > 1


def test_a_bias_of_no_token_is_refused(engine):
  s = Sampling(logit_bias=((engines.V, 1.0),))
  with pytest.raises(RequestRefused, match=f'to {engines.V - 1}; got'):
    ask(engine, prompt(1, 4), 1, sampling=s)


def test_a_chunked_prompt_is_scored_as_a_whole_one(engine):
  # 29 tokens in chunks of 8 and 2, up to the last, into the larger room.
  ids = prompt(3, 29)
  answer = ask(engine, ids, 2, adapter='two', prompt_logprobs=4)
  scored, rows = answer.prompt, expected(ids, 'two')
  assert [token.id for token in scored] == list(ids)
  assert scored[0].logprob is None and scored[0].top == ()
  for i, token in enumerate(scored[1:]):
    assert abs(token.logprob - rows[i][token.id]) < CLOSE
    best = np.sort(rows[i])[::-1][:4]
    np.testing.assert_allclose([p for _, p in token.top], best, atol=CLOSE)


@pytest.mark.parametrize('size', [1, 2, 17])
def test_a_prompt_may_be_scored_without_an_answer(engine, size):
  ids = prompt(4, size)
  answer = ask(engine, ids, 0, prompt_logprobs=0)
  assert len(answer.prompt) == size and answer.tokens == []
  assert answer.end.reason == LENGTH and answer.prompt[-1].top == ()


def test_an_answer_is_the_same_alone_and_in_any_company(engine):
  def submit(i):
    adapter, s = ('', 'one', 'two')[i % 3], SETTINGS[i % len(SETTINGS)]
    return ask(
      engine, prompt(i, SIZES[i % 7]), 5 + i % 4, adapter=adapter, sampling=s,
      seed=i, logprobs=2, client=f'c{i % 2}',
    )  # fmt: skip

  alone = [submit(i).wait() for i in range(9)]
  # In another order, so in other slots and beside others.
  together = {i: submit(i) for i in reversed(range(9))}
  for i, answer in enumerate(alone):
    assert answer.tokens == together[i].tokens
    pairs = zip(answer.scored, together[i].scored, strict=True)
    for a, b in pairs:
      assert abs(a.logprob - b.logprob) < CLOSE


def test_draws_depend_on_the_seed(engine):
  s = Sampling(temperature=1.0)
  ids = prompt(8, 5)
  seeds = (0, 1, 2**32, 2**40 + 1, -1, 0)
  actual = [ask(engine, ids, 9, sampling=s, seed=seed) for seed in seeds]
  actual = [tuple(answer.tokens) for answer in actual]
  assert actual[0] == actual[-1]
  # 9 tokens of 37: that two of the five are equal by chance is no worry.
  assert len(set(actual)) == 5


def test_draws_have_the_models_probabilities(engine):
  ids = prompt(9, 3)
  p = np.exp(expected(ids)[-1])
  s = Sampling(temperature=1.0)
  many = 400
  actual = []
  for seed in range(many):
    if len(actual) >= 30:
      actual[-30].wait()
    actual.append(ask(engine, ids, 1, sampling=s, seed=seed))
  counts = np.bincount([a.tokens[0] for a in actual], minlength=len(p))
  # The statistic's mean is the degrees of freedom, 36 at most; 36 + 5 times
  # the square root of 72 is passed by chance once in a million.
  stored = p > 1e-4
  statistic = ((counts - many * p) ** 2 / (many * p))[stored].sum()
  assert statistic < 36 + 5 * 72**0.5


def test_top_k_of_one_is_greedy(engine):
  ids = prompt(10, 6)
  s = Sampling(temperature=1.5, top_k=1)
  drawn = ask(engine, ids, 6, sampling=s)
  assert drawn.tokens == ask(engine, ids, 6).tokens


def test_an_answer_ends_with_one_of_its_ends(engine):
  ids = prompt(11, 6)
  whole = ask(engine, ids, 8, adapter='two').tokens
  at = 3
  first = whole.index(whole[at])
  answer = ask(engine, ids, 8, adapter='two', eos_token_ids=(whole[at], 999))
  assert answer.tokens == whole[: first + 1]
  assert answer.end.reason == STOP


@pytest.mark.parametrize(
  'name',
  [
    'gemma2',
    'gpt2',
    pytest.param('qwen2', marks=pytest.mark.slow),
    pytest.param('mistral', marks=pytest.mark.slow),
    pytest.param('qwen3', marks=pytest.mark.slow),
    pytest.param('sinusoidal', marks=pytest.mark.slow),
    pytest.param('alibi', marks=pytest.mark.slow),
  ],
)
def test_every_family_says_what_its_model_says(name):
  config = small_decoders.CONFIGS[name]
  model, variables = small_decoders.make(config)
  settings = EngineConfig(
    slots=3,
    max_model_len=19,
    chunk=4,
    min_chunk=4,
    cache_lens=(19,),
    batch_sizes=(3,),
  )
  own = {'params': variables['params'], 'peft': {}}
  model = Decoder(config)
  with running(model, own['params'], FixedAdapter(model), settings) as engine:
    # 19 places: the last chunk's padding stands beyond the learned ones.
    asked = [
      (prompt(i, size), ask(engine, prompt(i, size), 19 - size, logprobs=3))
      for i, size in enumerate((18, 5, 1, 13, 2))
    ]
    for ids, answer in asked:
      # The engine's last token is read by nobody.
      said = (*ids, *answer.tokens[:-1])
      rows = logprobs(said, model, own, 19)
      assert answer.tokens == rows[len(ids) - 1 :].argmax(-1).tolist()
      check(answer, ids, rows)
