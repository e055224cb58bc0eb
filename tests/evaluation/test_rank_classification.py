# SPDX-License-Identifier: Apache-2.0
"""Rank classification by hand: the likeliest choice wins, EOS included."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.data import TrainingData
from moepeft.data.batching import seq2seq
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation import eval_sets
from moepeft.evaluation.eval_sets import PromptExamples
from moepeft.evaluation.evaluator import Evaluator
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.evaluation.rank_classification import (
  EncodedExample,
  NonFiniteScoreError,
  Ranker,
  merge_shapes,
  score_choices,
)
from moepeft.evaluation.summary import mean_accuracies
from moepeft.models.t5 import model as t5
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.objectives import OBJECTIVES
from moepeft.tasks import Example

from ..contracts import small, small_decoders

WORDS = ByteTokenizer()
V = WORDS.size


class Bigram:
  """A model whose next token goes by the last one and the first of the inputs.

  Its variables are {'table': logits [v, v] after each token, 'echo': what the
  first token of the inputs gains everywhere}.
  """

  adapter_map = AdapterMap()
  config = types.SimpleNamespace(vocab=V, family='t5')

  def __init__(self, variables=None):
    self.variables = variables

  def bind(self, variables):
    return Bigram(variables)

  def encode(self, ids, ctx):
    return jnp.where(ctx.token_mask[..., None], jax.nn.one_hot(ids, V), 0)

  def decode(self, ids, ctx, encoded, source_ctx):
    del ctx, source_ctx
    return (
      self.variables['table'][ids] + self.variables['echo'] * encoded[:, :1]
    )

  def apply(self, variables, batch, **_):
    first = jax.nn.one_hot(batch['inputs'][:, :1], V)
    ids = batch['decoder_inputs']
    return variables['table'][ids] + variables['echo'] * first, {}


def variables(table=None, echo=0.0):
  table = np.zeros((V, V), np.float32) if table is None else table
  return {'table': jnp.asarray(table), 'echo': jnp.float32(echo)}


RANDOM = np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)


def log_likelihood(text):
  """The log-likelihood of a text and its EOS under RANDOM, token by token."""
  total, last = 0.0, 0
  for token in [*WORDS.encode(text), WORDS.eos]:
    row = RANDOM[last].astype(np.float64)
    total += row[token] - np.log(np.sum(np.exp(row)))
    last = token
  return total


def make_row(inputs, choices, label=0, idx=0):
  return Example(
    'echo', 't', idx, inputs, choices[label], tuple(choices), label
  )


@functools.cache
def ranker_of(batch_size):
  return Ranker(Bigram(), WORDS, 64, 16, batch_size)


def predict(rows, values, batch_size=4):
  ranker = ranker_of(batch_size)
  return ranker.predict(values, ranker.prepare(rows)).tolist()


SCORES = jax.jit(functools.partial(score_choices, Bigram()))


def scores(values, choices, length=7):
  """score_choices of texts, all for one input."""
  ids = np.zeros((1, len(choices), length), np.int32)
  mask = np.zeros(ids.shape, bool)
  for i, text in enumerate(choices):
    tokens = [*WORDS.encode(text), WORDS.eos]
    ids[0, i, : len(tokens)], mask[0, i, : len(tokens)] = tokens, True
  batch = {
    'inputs': jnp.array([[5, 1]]),
    'inputs_mask': jnp.ones((1, 2), bool),
  }
  return np.asarray(SCORES(values, batch, ids, mask))[0]


def test_a_score_is_the_sum_over_a_choice_s_tokens_and_its_eos():
  choices = ('a', 'abc', 'cb', 'bcabc')
  actual = scores(variables(RANDOM), choices)
  # Float32 sums of at most six numbers near six.
  np.testing.assert_allclose(
    actual, [log_likelihood(text) for text in choices], rtol=1e-5
  )


def test_a_score_is_not_normalised_by_length():
  # Every token costs ln v: 2, 4 and 3 of them.
  actual = scores(variables(), ('a', 'abc', 'cb'))
  np.testing.assert_allclose(
    actual, -np.log(V) * np.array([2, 4, 3]), rtol=1e-5
  )


def test_padding_and_other_choices_never_move_a_score():
  values = variables(RANDOM)
  expected = scores(values, ('abc', 'cb'))
  np.testing.assert_allclose(
    scores(values, ('abc', 'cb', 'a', 'a'), 11)[:2], expected, rtol=1e-6
  )


def test_the_score_of_a_model_is_that_of_a_plain_call():
  model, values = t5.T5(small.GATED), {'params': small.params()}
  rng = np.random.default_rng(0)
  # Inputs of 7 and 4 tokens; choices of 5, 3 and 2, EOS and all.
  source, target = np.arange(7) < [[7], [4]], np.arange(5) < [[5], [3], [2]]
  inputs = rng.integers(2, 37, (2, 7)) * source
  targets = rng.integers(2, 37, (2, 3, 5)) * target
  mask = np.broadcast_to(target, targets.shape)
  batch = {'inputs': jnp.asarray(inputs), 'inputs_mask': jnp.asarray(source)}
  actual = jax.jit(score_choices, static_argnums=0)(
    model, values, batch, targets, mask
  )
  # The same as six rows, wider by padding in which there is something.
  wide = {
    'inputs': np.pad(inputs, ((0, 0), (0, 4)), constant_values=23),
    'inputs_mask': np.pad(source, ((0, 0), (0, 4))),
  }
  plain = {key: np.repeat(array, 3, axis=0) for key, array in wide.items()}
  flat = targets.reshape(6, 5)
  plain['decoder_inputs'] = np.pad(flat[:, :-1], ((0, 0), (1, 3)))
  plain['targets_mask'] = np.pad(mask.reshape(6, 5), ((0, 0), (0, 3)))
  logits = np.asarray(jax.jit(model.apply)(values, plain), np.float64)
  log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  expected = np.zeros(6)
  for i in range(6):
    for t in range((5, 3, 2)[i % 3]):
      expected[i] += log_p[i, t, flat[i, t]]
  # Logits near ten after five layers in float32.
  np.testing.assert_allclose(actual, expected.reshape(2, 3), rtol=1e-4)


OF_TASKS = "router=task(tasks=['a', 'b'])"
OF_EMBEDDINGS = "reads='embedding', embedding_size=3"


@pytest.mark.parametrize(
  ('kind', 'router'),
  [
    ('encoder-decoder', OF_TASKS),
    ('decoder', OF_TASKS),
    ('encoder-decoder', OF_EMBEDDINGS),
    ('decoder', OF_EMBEDDINGS),
    ('encoder-decoder', 'router=sentence'),
    pytest.param('decoder', 'router=sentence', marks=pytest.mark.slow),
  ],
)
def test_a_router_of_examples_ranks_as_it_was_trained(kind, router):
  """A choice's score is its likelihood as a row of training."""
  method = f"molora(experts=3, rank=2, {router}, targets='*/self/q|*/wo')"
  if kind == 'decoder':
    config = dataclasses.replace(small_decoders.CONFIGS['llama'], vocab=263)
    model, values = small_decoders.make(config, method, noise=0.1)
  else:
    config = dataclasses.replace(small.GATED, vocab=263)
    model, _ = small.make(method, config)
    values = small.variables(method, config, noise=0.1)
  # They differ in their task and their embedding alone.
  rows = [
    Example(task, '', 0, 'abcd', 'yes', ('yes', 'no'), 0, embedding)
    for task, embedding in (
      ('a', np.array([9, 0, 0], np.float32)),
      ('b', np.array([0, 9, 0], np.float32)),
    )
  ]
  ranker = Ranker(model, WORDS, 11, 5, 2)
  scores = np.array(ranker.scores(values, ranker.prepare(rows)))
  each = [
    dataclasses.replace(row, targets=choice)
    for row in rows
    for choice in row.choices
  ]
  likelihood = Likelihood(model, WORDS, 11, 5, 4)
  nll, _ = likelihood.sums(values, each)
  # Logits near ten in float32, in rows of other lengths.
  np.testing.assert_allclose(scores.reshape(-1), -nll, rtol=1e-4)
  differs = np.abs(scores[0] - scores[1]).max() > 1e-2
  assert differs == (router in (OF_TASKS, OF_EMBEDDINGS))


# Of 2, 3 and 5 choices, so that some are filled up to 4 and 8; more rows than
# a batch; and one with long inputs and choices, which is a shape of its own.
ROWS = [
  make_row('b?', 'ab', 1),
  make_row('a?', 'ab', 0),
  make_row('c?', 'abc', 2),
  make_row('b?', 'abc', 1),
  make_row('e?', 'abcde', 4),
  make_row('d?', 'abcde', 3),
  make_row('a?', 'bca', 2),
  make_row('b' * 50, ['aa', 'bb'], 1),
]
LABELS = [row.label for row in ROWS]


def test_a_model_that_echoes_chooses_what_the_inputs_begin_with():
  assert predict(ROWS, variables(echo=2.0)) == LABELS
  # One that avoids it never does; of two, it takes the other.
  actual = predict(ROWS, variables(echo=-2.0))
  assert not any(a == b for a, b in zip(actual, LABELS, strict=True))
  assert actual[:2] == [0, 1]


def test_a_prediction_does_not_depend_on_the_rows_beside_it():
  values = variables(RANDOM, echo=0.5)
  together = predict(ROWS, values)
  assert together == [predict([row], values)[0] for row in ROWS]
  assert together == predict(ROWS, values, batch_size=3)
  assert together == predict(ROWS[::-1], values)[::-1]


def rows_of(lengths):
  """One row for each (choices, length of the inputs, of a choice), with EOS."""
  return [
    EncodedExample([7] * s, tuple([i + 7] * t for i in range(c)), False)
    for c, s, t in lengths
  ]


# Parameters of a model that computes less in the time of a compilation than any
# padding costs, and of one that computes all of it at once.
HUGE, TINY = 10**12, 1


def test_rows_of_a_huge_model_share_batches_with_rows_of_like_lengths():
  ranker = Ranker(Bigram(), WORDS, 512, 16, 2)
  lengths = [(2, 60, 3)] * 17 + [(2, 300, 3)] + [(3, 65, 5)] * 3
  parts = list(ranker.plan_batches(rows_of(lengths), HUGE))
  assert [part.shape for part in parts] == [
    # Three rows: four of 128 and 8 are as large as one and a half of the
    # longest, 512 and 16, so there is room for 2 x 2 of them.
    (4, 3, 128, 8),
    # 300 is rounded to 512: no more than the two of the batch size.
    (1, 2, 512, 8),
    # 2 x 2 go into a batch: 16 / 8 targets.
    *[(4, 2, 64, 8)] * 5,
  ]
  indices = [i for part in parts for i in part.indices]
  assert sorted(indices) == list(range(21))


def test_rows_of_a_tiny_model_have_one_program():
  ranker = Ranker(Bigram(), WORDS, 512, 16, 2)
  lengths = [(2, 60, 3)] * 3 + [(2, 300, 3)] + [(3, 65, 5)]
  parts = list(ranker.plan_batches(rows_of(lengths), TINY))
  assert [part.shape for part in parts] == [(2, 3, 512, 8)] * 3
  # The shorter rows of a later call have it too.
  (part,) = ranker.plan_batches(rows_of([(2, 60, 3)]), TINY)
  assert part.shape == (2, 3, 512, 8)
  # Longer choices need another.
  (part,) = ranker.plan_batches(rows_of([(2, 60, 9)]), TINY)
  assert part.shape == (1, 2, 64, 16)


@pytest.mark.parametrize(
  'program_tokens, expected',
  [
    # Merging the first two adds 10 x 2 tokens, more than a program is worth.
    (19, [(1, 8, 8), (1, 10, 8), (1, 30, 8)]),
    (21, [(1, 10, 8), (1, 10, 8), (1, 30, 8)]),
    # To merge those into the last one adds 10 x 20 + 5 x 20.
    (299, [(1, 10, 8), (1, 10, 8), (1, 30, 8)]),
    (301, [(1, 30, 8)] * 3),
  ],
)
def test_shapes_are_merged_where_padding_costs_less(program_tokens, expected):
  counts = {(1, 8, 8): 10, (1, 10, 8): 5, (1, 30, 8): 1}
  merged = merge_shapes(counts, lambda shape: shape[1], program_tokens)
  assert list(merged.values()) == expected


def test_a_shape_with_a_program_costs_its_padding_alone():
  counts = {(1, 8, 8): 10, (1, 4, 16): 1}
  merged = merge_shapes(
    counts, lambda shape: shape[1], 21, compiled={(1, 10, 8)}
  )
  # The union of the two, (1, 8, 16), would add 4 tokens and save a program;
  # the compiled one adds 20 and saves a program, and does not hold the other.
  assert merged == {(1, 8, 8): (1, 8, 16), (1, 4, 16): (1, 8, 16)}
  del counts[1, 4, 16]
  merged = merge_shapes(
    counts, lambda shape: shape[1], 21, compiled={(1, 10, 8)}
  )
  assert merged == {(1, 8, 8): (1, 10, 8)}


def test_many_choices_make_for_fewer_rows():
  ranker = Ranker(Bigram(), WORDS, 64, 16, 8)
  # There is room for 8 rows of 4 choices of 16 tokens. 16 of 16 take
  # four times that each, 8 of 8 as much as 4 of 16.
  (first, *_) = ranker.plan_batches(rows_of([(16, 9, 16)] * 9), HUGE)
  assert first.shape == (2, 16, 64, 16)
  (first, *_) = ranker.plan_batches(rows_of([(8, 9, 8)] * 9), HUGE)
  assert first.shape == (8, 8, 64, 8)


def test_a_last_batch_is_no_larger_than_its_rows_need():
  ranker = Ranker(Bigram(), WORDS, 64, 16, 32)
  (part,) = ranker.plan_batches(rows_of([(2, 9, 16)] * 5), HUGE)
  assert part.shape == (8, 2, 64, 16)
  # A program that there is needs no other to be compiled.
  parts = ranker.plan_batches(rows_of([(2, 9, 16)] * (32 + 3)), HUGE)
  assert [part.shape for part in parts] == [(32, 2, 64, 16), (8, 2, 64, 16)]


def test_progress_is_told_of_every_example():
  ranker, told = Ranker(Bigram(), WORDS, 64, 16, 2), []
  prepared = ranker.prepare(ROWS)
  actual = ranker.scores(variables(RANDOM), prepared, told.append)
  assert sum(told) == len(ROWS) and len(told) > 1
  for row, own in zip(ROWS, actual, strict=True):
    np.testing.assert_allclose(
      own, [log_likelihood(choice) for choice in row.choices], rtol=1e-5
    )


def test_the_shortest_of_equal_tokens_wins_and_ties_go_to_the_first():
  rows = [
    make_row('q', ['abc', 'ab', 'c']),
    make_row('q', ['ab', 'ba']),
    make_row('q', ['abc', 'ba', 'cd']),
  ]
  assert predict(rows, variables()) == [2, 0, 1]


def test_a_choice_that_ends_where_text_ends_wins():
  # Both letters are as likely; only what follows them tells them apart.
  table = np.zeros((V, V), np.float32)
  (b,) = WORDS.encode('b')
  table[b, WORDS.eos] = 1.0
  assert predict([make_row('q', 'abc')], variables(table)) == [1]


def evaluator_of(tmp_path, rows, validation=(), **evaluation):
  path = tmp_path / 'rows.jsonl'
  remaining = ('task', 'inputs', 'choices', 'label')
  lines = [
    json.dumps({'idx': i} | {key: getattr(e, key) for key in remaining})
    for i, e in enumerate(rows)
  ]
  path.write_text('\n'.join(lines))
  config = config_lib.default()
  config.data.source = 'jsonl'
  config.data.inputs_length, config.data.targets_length = 64, 16
  config.evaluation.update(path=str(path), batch_size=3, **evaluation)
  return config, Evaluator(
    Bigram(),
    WORDS,
    (64, 16),
    3,
    validation=validation,
    collator=Seq2SeqCollator(WORDS, 64, 16),
    objective=OBJECTIVES['seq2seq'].build(),
    prompts=eval_sets.training_prompts(config, TrainingData(None, {})),
  )


def test_accuracy_is_the_share_of_rows_whose_label_is_chosen(tmp_path):
  # Two of the five labels are not what the echo chooses.
  rows = [*ROWS[:3], make_row('a?', 'ab', 1), make_row('c?', 'abc', 0)]
  _, evaluator = evaluator_of(tmp_path, rows)
  (row,) = evaluator(variables(echo=2.0), 'now', 0)['rows']
  assert (row['task'], row['examples']) == ('echo', 5)
  assert row['accuracy'] == pytest.approx(3 / 5)
  # Two choices in three rows, three in two.
  assert row['chance'] == pytest.approx((3 / 2 + 2 / 3) / 5)


def test_rows_to_rank_are_taken_at_even_distances(tmp_path):
  config, _ = evaluator_of(tmp_path, ROWS, max_examples=3)
  (prompt,) = eval_sets.training_prompts(config, TrainingData(None, {}))
  # 0, 8/3 and 16/3 of eight rows, rounded down.
  assert [e.idx for e in prompt.examples] == [0, 2, 5]


def test_validation_loss_is_a_mean_over_tokens_of_all_rows(tmp_path):
  # Batches of three: one of long rows, one with a short row and filled up.
  texts = ('abcabc', 'cbacba', 'bcabca', 'a')
  rows = [Example('v', 't', i, 'q', t, (), -1) for i, t in enumerate(texts)]
  pairs = seq2seq.encode_examples(WORDS, rows, 64, 16)
  _, evaluator = evaluator_of(tmp_path, ROWS, pairs)
  actual = evaluator.validation(variables(RANDOM))['validation_loss']
  # Six tokens and EOS three times, one and EOS once.
  expected = -sum(map(log_likelihood, texts)) / (3 * 7 + 2)
  assert actual == pytest.approx(expected, rel=1e-5)


def test_means_are_over_tasks_of_a_group_and_its_wordings():
  rows = [
    dict(group='B', task=task, templates=split, accuracy=accuracy)
    for task, split, accuracy in (
      ('a', 'seen', 0.5),
      ('b', 'seen', 1.0),
      ('a', 'held_out', 0.25),
    )
  ]
  assert mean_accuracies(rows) == {'B seen': 0.75, 'B held_out': 0.25}


def test_what_cannot_be_told_apart_is_left_out_and_told(capsys):
  rows = make_row('q', ['abx', 'aby']), make_row('q', ['a', 'b'])
  prompts = (
    PromptExamples('evaluation', 'x', '', rows),
    PromptExamples('evaluation', 'y', '', rows[:1]),
  )
  evaluator = Evaluator(Bigram(), WORDS, (160, 3), 32, prompts=prompts)
  actual = evaluator(variables(), 'now', 0)
  assert [(r['task'], r['examples'], r['cut']) for r in actual['rows']] == [
    ('x', 1, 0)
  ]
  assert '2 examples are left out' in capsys.readouterr().out


def test_weights_that_are_not_finite_choose_nothing(capsys):
  # NaN would pass for the greatest score, and choose the first.
  table = np.zeros((V, V), np.float32)
  table[0] = np.nan
  with pytest.raises(
    NonFiniteScoreError, match='2 of 2 .* the run has diverged'
  ) as e:
    predict([make_row('q', 'ab'), make_row('q', 'abc')], variables(table))
  assert '\n' not in str(e.value)
  prompts = (PromptExamples('evaluation', 'x', '', (make_row('q', 'ab'),)),)
  evaluator = Evaluator(Bigram(), WORDS, (160, 20), 32, prompts=prompts)
  actual = evaluator(variables(table), 'now', 0)
  # Training goes on without accuracies, and says so.
  assert (actual['rows'], actual['means']) == ([], {})
  assert 'no accuracy: 1 of 1 ranked' in capsys.readouterr().out
