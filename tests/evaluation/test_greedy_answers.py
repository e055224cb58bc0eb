# SPDX-License-Identifier: Apache-2.0
"""Greedy answers: those of a plain loop, ended where they end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft import generate
from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.evaluation.greedy_answers import BatchGenerator
from moepeft.tasks import Example

from ..contracts import small

WORDS = ByteTokenizer()
# Bytes have 259 ids.
CONFIG = dataclasses.replace(small.GATED, vocab=263)
METHOD = "molora(experts=3, rank=2, targets='*/q|*/wo')"
LENGTH, MOST = 7, 97
# Of both buckets, one of them cut.
TEXTS = ['a', 'where is it?', '你好' * 3, 'Which one? ' * 7, 'x' * 300]
ROWS = [Example('t', 'p', i, x, '', (), -1) for i, x in enumerate(TEXTS)]


@functools.cache
def made():
  model, _ = small.make(METHOD, CONFIG)
  # With this noise the second answer's third token comes nowhere before it.
  return model, small.variables(METHOD, CONFIG, noise=0.3)


@functools.cache
def plain_call():
  return jax.jit(made()[0].apply)


def plain(variables, text):
  """Answer ids of one text: whole calls, no cache, no padding of inputs."""
  ids = [*WORDS.encode(text)[: MOST - 1], WORDS.eos]
  said = np.zeros((1, LENGTH + 1), np.int32)
  for i in range(LENGTH):
    # What comes after a position does not reach it: the decoder is causal.
    batch = {'inputs': np.array([ids]), 'decoder_inputs': said[:, :-1]}
    said[0, i + 1] = np.argmax(plain_call()(variables, batch)[0, i])
    if said[0, i + 1] == WORDS.eos:
      return said[0, 1 : i + 2].tolist()
  return said[0, 1:].tolist()


@functools.cache
def ending():
  """Variables with which the second answer ends at its third token."""
  variables = made()[1]
  eos, last = WORDS.eos, plain(variables, TEXTS[1])[2]
  kernel = np.array(variables['params']['head']['kernel'])
  kernel[:, [eos, last]] = kernel[:, [last, eos]]
  params = variables['params'] | {'head': {'kernel': jnp.asarray(kernel)}}
  return variables | {'params': params}


class Listening:
  """Bytes that keep the ids that they decode."""

  size, eos, encode = WORDS.size, WORDS.eos, staticmethod(WORDS.encode)

  def decode(self, ids):
    return tuple(ids)


def generator(batch_size=2, words=WORDS, most=MOST):
  return BatchGenerator(made()[0], words, most, LENGTH, batch_size)


# Each text is of another length, for which the plain call is compiled: a short
# one, one that ends early and one that is cut are for the fast suite.
@pytest.mark.parametrize(
  'rows', [[*ROWS[:2], ROWS[4]], pytest.param(ROWS, marks=pytest.mark.slow)]
)
def test_answers_are_those_of_a_loop_without_cache_and_padding(rows):
  variables = ending()
  expected = [plain(variables, row.inputs) for row in rows]
  assert expected[1][2:] == [WORDS.eos] and len(expected[0]) == LENGTH
  actual = generator(words=Listening()).answers(variables, rows)
  # Padding and EOS are no text.
  remaining = [tuple(t for t in row if t > WORDS.eos) for row in expected]
  assert actual == remaining
  texts = generator().answers(variables, rows)
  assert texts == [WORDS.decode(list(row)) for row in remaining]


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_rows_beside_it():
  variables = ending()
  together = generator(words=Listening()).answers(variables, ROWS)
  backwards = generator(5, Listening()).answers(variables, ROWS[::-1])
  assert backwards[::-1] == together
  alone = generator(1, Listening())
  assert [alone.answers(variables, [row])[0] for row in ROWS] == together


@pytest.mark.slow
def test_an_answer_does_not_depend_on_padding():
  variables = ending()
  expected = generator(words=Listening()).answers(variables, ROWS[:3])
  # 27 tokens hold the longest.
  short = generator(words=Listening(), most=27)
  actual = short.answers(variables, ROWS[:3])
  assert actual == expected


@pytest.mark.slow
def test_what_is_cut_and_done_is_told():
  messages = []
  actual = generator(2)
  actual.answers(ending(), ROWS, messages.append)
  assert sum(messages) == len(ROWS) and len(messages) > 1
  assert actual.cut(ROWS).tolist() == [False] * 4 + [True]
  assert actual.answers(ending(), []) == []
  assert actual.cut([]).shape == (0,)


# Of a decoder: tests/inference/test_generator.py.
@pytest.mark.slow
def test_a_command_answers_as_an_evaluation_does():
  model, _ = made()
  actual = generate.answer(model, ending(), WORDS, TEXTS[:3], LENGTH)
  assert actual == generator().answers(ending(), ROWS[:3])


def test_an_answer_has_a_token():
  with pytest.raises(ValueError, match='got max_new_tokens=0'):
    BatchGenerator(made()[0], WORDS, 97, 0, 3)
