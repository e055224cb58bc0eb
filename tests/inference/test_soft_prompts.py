# SPDX-License-Identifier: Apache-2.0
"""Texts behind a soft prompt, wherever texts become ids."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data.batching.collators import Seq2SeqCollator, make_model_collator
from moepeft.data.batching.decoder_only import (
  CausalCollator,
  Sample,
  make_sample,
)
from moepeft.data.preference.dataset import objective_collator
from moepeft.data.text import dataset as text
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation.greedy_answers import BatchGenerator
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.rank_classification import Ranker
from moepeft.inference.generator import GenerationConfig, Generator
from moepeft.inference.sampling import Sampling
from moepeft.models.decoder.model import Decoder
from moepeft.peft.prefix import model_prefix_ids
from moepeft.tasks import Example

from ..contracts import answers
from ..prompted import CLOSE, LLAMA, T5, applied, made

WORDS = ByteTokenizer()
BOTH = pytest.mark.parametrize('config', [T5, LLAMA], ids=['t5', 'llama'])
# Where both run the same code but for the model.
LLAMA_FIRST = pytest.mark.parametrize(
  'config',
  [
    pytest.param(T5, id='t5', marks=pytest.mark.slow),
    pytest.param(LLAMA, id='llama'),
  ],
)
AHEAD = (263, 264, 265)


def example(inputs, targets, choices=()):
  return Example('t', 't', 0, inputs, targets, choices, 0 if choices else -1)


def test_placeholders_stand_before_a_decoders_text_and_nothing_of_it_changes():
  own = CausalCollator(WORDS, 10, prefix_ids=AHEAD)
  (actual,) = own.encode([example('ab', 'c')])
  # Bytes plus 3: a 100, b 101, the line's end 13, c 102; EOS is 1.
  assert actual.ids.tolist() == [*AHEAD, 100, 101, 13, 102, 1]
  np.testing.assert_array_equal(actual.loss_mask, [0, 0, 0, 0, 0, 0, 1, 1])
  # Of a text that is trained whole the first token follows a prompt, not a
  # text: it is not trained, as without a prompt.
  (whole,) = own.encode([Sample(np.array([5, 6]), np.ones(2, bool))])
  np.testing.assert_array_equal(whole.loss_mask, [0, 0, 0, 0, 1])


def test_placeholders_count_in_a_decoders_row():
  own = CausalCollator(WORDS, 7, prefix_ids=AHEAD)
  # A row of 7 is fed, with one token more to predict: of 8, 3 are the prompt's.
  long = make_sample([9, 8, 7, 6], [5, 4])
  (actual,) = own.encode([long])
  assert actual.ids.tolist() == [*AHEAD, 8, 7, 6, 5, 4]
  assert own.count_truncated([long]) == 1
  assert own.count_truncated([make_sample([7, 6], [5, 4, 3])]) == 0
  rows = own.pad([actual])
  assert rows['inputs'].tolist() == [[*AHEAD, 8, 7, 6, 5]]
  assert rows['targets_mask'].tolist() == [[False] * 5 + [True] * 2]


def test_placeholders_stand_before_the_inputs_of_pairs_and_count():
  own = Seq2SeqCollator(WORDS, 6, 4, prefix_ids=AHEAD)
  actual = own.encode(
    [example('a', 'b'), example('abcdef', 'b'), ([7, 8, 9, 6, 1], [5, 1])]
  )
  # Of six places the text has three, the last is EOS's.
  assert [list(map(int, pair.inputs)) for pair in actual] == [
    [*AHEAD, 100, 1],
    [*AHEAD, 100, 101, 1],
    [*AHEAD, 7, 8, 1],
  ]
  assert [list(map(int, pair.targets)) for pair in actual] == [
    [101, 1],
    [101, 1],
    [5, 1],
  ]
  assert own.count_truncated([example('abc', 'b')]) == 1
  assert own.count_truncated([example('a', 'b')]) == 0


@pytest.mark.parametrize('predict', ['next', 'prefix', 'spans'])
def test_pieces_of_text_leave_room_for_the_prompt(predict):
  data = config_lib.default().data
  data.pretraining_objective = predict
  # A piece has one token more than are fed; spans share a decoder's row.
  whole, behind = (
    text.chunk_maker(data, CausalCollator(WORDS, n, prefix_ids=front), 300)[0]
    for n, front in ((23, ()), (26, AHEAD))
  )
  assert whole == behind
  if predict == 'next':
    assert whole == 24
    return
  whole, behind = (
    text.chunk_maker(data, Seq2SeqCollator(WORDS, n, 9, prefix_ids=front), 300)[
      0
    ]
    for n, front in ((23, ()), (26, AHEAD))
  )
  assert whole == behind


def test_a_prompt_that_leaves_no_room_is_refused():
  with pytest.raises(ValueError, match='3 tokens leaves no room .*length=4'):
    CausalCollator(WORDS, 4, prefix_ids=AHEAD)
  with pytest.raises(ValueError, match='no room .*inputs_length=4'):
    Seq2SeqCollator(WORDS, 4, 4, prefix_ids=AHEAD)


def test_answers_that_are_compared_have_no_prompt():
  data = config_lib.default().data
  data.source = 'preference'
  own = make_model_collator(data, WORDS, LLAMA, 0)
  own = dataclasses.replace(own, prefix_ids=AHEAD)
  with pytest.raises(ValueError, match="'dpo' does not go with a soft prompt"):
    objective_collator(data, 'dpo', 'pair', own)


EXAMPLES = [
  example('where', 'here'),
  example('a longer one', 'no'),
  example('x', 'yes it is'),
]


@LLAMA_FIRST
def test_packed_texts_have_a_prompt_each_and_are_as_alone(config):
  model, variables = made(config)
  if config is T5:
    own = Seq2SeqCollator(WORDS, 47, 29, prefix_ids=AHEAD)
  else:
    own = CausalCollator(WORDS, 64, prefix_ids=AHEAD)
  encoded = own.encode(EXAMPLES)
  alone, packed = own.pad(encoded), own.pack(encoded, [[0, 1, 2]])
  assert len(packed['inputs']) == 1
  assert (packed['inputs'] >= 263).sum() == 9
  # Rows of one length have one program.
  logits = [applied(model)(variables, rows) for rows in (alone, packed)]
  actual = np.asarray(logits[1][0][packed['targets_mask'][0]])
  np.testing.assert_allclose(
    actual, np.asarray(logits[0])[alone['targets_mask']], **CLOSE
  )


def log_p(model, variables, config, text):
  """log p of each token of an example's targets, by hand."""
  x, y = text.inputs, text.targets
  y = [*WORDS.encode(y), WORDS.eos]
  if config is T5:
    x = [*AHEAD, *WORDS.encode(x), WORDS.eos]
    batch = {'inputs': [x], 'decoder_inputs': [[0, *y[:-1]]]}
  else:
    x = [*AHEAD, *WORDS.encode(x + '\n')]
    batch = {'inputs': [[*x, *y[:-1]]]}
  batch = {key: jnp.array(rows) for key, rows in batch.items()}
  logits = applied(model)(variables, batch)[0, -len(y) :]
  return jax.nn.log_softmax(logits)[jnp.arange(len(y)), jnp.array(y)]


@LLAMA_FIRST
def test_likelihoods_and_rankings_are_of_texts_behind_the_prompt(config):
  model, variables = made(config)
  text = EXAMPLES[0]
  expected = float(log_p(model, variables, config, text).sum())
  likelihood = Likelihood(model, WORDS, 32, 16, 1)
  (actual,), (tokens,) = likelihood.sums(variables, [text])
  assert tokens == 5 and actual == pytest.approx(-expected, rel=1e-4)
  other = dataclasses.replace(text, targets='gone')
  ranker = Ranker(model, WORDS, 32, 16, 1)
  rows = ranker.prepare([dataclasses.replace(text, choices=('here', 'gone'))])
  (scores,) = ranker.scores(variables, rows)
  np.testing.assert_allclose(
    scores,
    [expected, float(log_p(model, variables, config, other).sum())],
    rtol=1e-4,
  )


@BOTH
def test_cached_answers_are_those_of_whole_texts_behind_the_prompt(config):
  model, variables = made(config)
  ids = [9, 8, 7]
  settings = GenerationConfig(6, (1000,))
  prompts = [ids, [5, 5, 5, 5, 5, 6]]
  actual = Generator(model, variables, WORDS, settings).generate_ids(prompts)
  for own, answer in zip(prompts, actual, strict=True):
    said = [0] if config is T5 else [*AHEAD, *own]
    begin = len(said)
    for _ in range(6):
      batch = {'inputs': np.array([said])}
      if config is T5:
        batch = {
          'inputs': np.array([[*AHEAD, *own]]),
          'decoder_inputs': np.array([said]),
        }
      padded = padded_to(batch, 16)
      logits = np.asarray(applied(model)(variables, padded))
      said.append(int(np.argmax(logits[0, len(said) - 1])))
    assert answer == said[begin:]
  # Without the prompt it says something else.
  assert answers.uncached_greedy(model, variables, ids, 6) != actual[0]


def padded_to(batch, length):
  """So that all lengths are one program."""
  actual = {}
  for name, ids in batch.items():
    more = ((0, 0), (0, length - ids.shape[1]))
    side = {'inputs': 'inputs_mask', 'decoder_inputs': 'targets_mask'}[name]
    # By NumPy: JAX would compile a program for each length.
    actual[name] = np.pad(ids, more)
    actual[side] = np.arange(length)[None] < ids.shape[1]
  return actual


@LLAMA_FIRST
def test_answers_of_examples_are_behind_the_prompt(config):
  model, variables = made(config)
  text = EXAMPLES[0]
  generator = BatchGenerator(model, WORDS, 40, 5, 1, eos_token_ids=(1000,))
  # Of 40 places the prompt has three, and an end or a line's end one.
  longest = example('a' * 36, '')
  config_ = GenerationConfig(5, (1000,))
  plain = Generator(model, variables, WORDS, config_)
  end = WORDS.eos if config is T5 else 13
  for one in (text, longest):
    ids = [*WORDS.encode(one.inputs), end]
    expected = plain.generate_texts([ids])
    assert generator.answers(variables, [one]) == expected
  assert not generator.cut([longest]).any()
  assert generator.cut([example('a' * 37, '')]).all()


def test_a_decoders_places_count_the_prompt():
  config = GenerationConfig(7, (1,))
  generation = Generator(*made(LLAMA), WORDS, config)
  # 127 places, 3 of the prompt, 7 of the answer.
  generation.check_prompts([[5] * 117])
  with pytest.raises(ValueError, match='118 tokens, its soft prompt 3'):
    generation.check_prompts([[5] * 118])


def test_a_repetition_penalty_knows_nothing_of_placeholders():
  model, variables = made(LLAMA)
  sampling = Sampling(repetition_penalty=1.5)
  config = GenerationConfig(6, (1000,), sampling=sampling)
  (answer,) = Generator(model, variables, WORDS, config).generate_ids([[9, 8]])
  # Logits of the prompt's and the answer's own tokens are made smaller.
  ids = [*AHEAD, 9, 8]
  for token in answer:
    padded = padded_to({'inputs': jnp.array([ids])}, 16)
    logits = np.array(applied(model)(variables, padded)[0, len(ids) - 1])
    own = list(set(ids[3:]))
    small = np.where(logits[own] < 0, logits[own] * 1.5, logits[own] / 1.5)
    logits[own] = small
    assert token == int(np.argmax(logits))
    ids.append(token)


def test_a_model_without_a_prompt_has_nothing_before_its_texts():
  model = Decoder(LLAMA)
  assert model_prefix_ids(model) == ()
  own = CausalCollator(WORDS, 7)
  given = make_sample([9], [8])
  assert own.encode([given])[0] is given
