# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of targets: those of plain calls, whatever stands beside."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moepeft.data.batching import seq2seq
from moepeft.data.batching.collators import Seq2SeqCollator
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation.evaluator import Evaluator
from moepeft.evaluation.loglikelihood import Likelihood
from moepeft.objectives import OBJECTIVES
from moepeft.tasks import Example

from ..contracts import small

WORDS = ByteTokenizer()
# Bytes have 259 ids.
CONFIG = dataclasses.replace(small.GATED, vocab=263)
METHOD = "molora(experts=3, rank=2, targets='*/q|*/wo')"
LENGTHS = 97, 23


def make_row(inputs, targets):
  return Example('t', 'p', 0, inputs, targets, (), -1)


# Of two shapes; the last is cut.
ROWS = [
  make_row('a', 'yes'),
  make_row('where is it?', ''),
  make_row('b' * 70, 'no, it is not so'),
  make_row('你好' * 5, '世界'),
  make_row('d' * 200, 'long targets' * 3),
]


@functools.cache
def made():
  model, _ = small.make(METHOD, CONFIG)
  return model, small.variables(METHOD, CONFIG, noise=0.1)


@functools.cache
def likelihood(batch_size=3):
  return Likelihood(made()[0], WORDS, *LENGTHS, batch_size)


@functools.cache
def plain_call():
  return jax.jit(made()[0].apply)


def alone(row):
  """-log p of a row's targets by a call without padded inputs, in float64."""
  x, y, _ = seq2seq.encode_example(WORDS, row, *LENGTHS)
  # What comes after a position does not reach it: the decoder is causal.
  said = seq2seq.pad_rows([[0, *y[:-1]]], LENGTHS[1])
  batch = {'inputs': np.array([x]), 'decoder_inputs': said}
  logits = np.asarray(plain_call()(made()[1], batch)[0], np.float64)
  log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  return -sum(log_p[t, token] for t, token in enumerate(y))


def test_sums_are_those_of_plain_calls():
  nll, tokens = likelihood().sums(made()[1], ROWS)
  assert nll.dtype == np.float64 and tokens.dtype == np.int64
  # Bytes and EOS; 世界 is six bytes.
  assert tokens.tolist() == [4, 1, 17, 7, 23]
  # Logits of five layers in float32.
  np.testing.assert_allclose(nll, [alone(row) for row in ROWS], rtol=1e-5)


@pytest.mark.slow
def test_batches_and_order_never_move_a_sum():
  variables = made()[1]
  nll, tokens = likelihood().sums(variables, ROWS)
  for batch_size in (1, 5):
    actual, count = likelihood(batch_size).sums(variables, ROWS[::-1])
    np.testing.assert_array_equal(count[::-1], tokens)
    # Float32 sums in another order.
    np.testing.assert_allclose(actual[::-1], nll, rtol=2e-6)


def test_the_mean_is_the_validation_loss():
  model, variables = made()
  evaluator = Evaluator(
    model,
    WORDS,
    LENGTHS,
    3,
    validation=seq2seq.encode_examples(WORDS, ROWS, *LENGTHS),
    collator=Seq2SeqCollator(WORDS, *LENGTHS),
    objective=OBJECTIVES['seq2seq'].build(),
  )
  nll, tokens = likelihood().sums(variables, ROWS)
  expected = evaluator.validation(variables)['validation_loss']
  assert nll.sum() / tokens.sum() == pytest.approx(expected, rel=2e-6)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary():
  nothing = jax.tree.map(np.zeros_like, made()[1])
  nll, tokens = likelihood().sums(nothing, ROWS)
  # Every token costs ln 263.
  perplexity = np.exp(nll.sum() / tokens.sum())
  assert perplexity == pytest.approx(263, rel=1e-6)


def test_what_is_cut_and_done_is_told():
  messages = []
  scores = likelihood()
  scores.sums(made()[1], ROWS, messages.append)
  assert sum(messages) == len(ROWS) and len(messages) > 1
  assert scores.cut(ROWS).tolist() == [False] * 4 + [True]
  nll, tokens = scores.sums(made()[1], [])
  assert nll.shape == tokens.shape == scores.cut([]).shape == (0,)


def test_batches_of_a_shape_share_a_program():
  scores = Likelihood(made()[0], WORDS, *LENGTHS, 3)
  scores.sums(made()[1], ROWS[:2] * 7)
  assert scores._losses._cache_size() == 1
