# SPDX-License-Identifier: Apache-2.0
"""Whatever the logits, what comes out under a schema fits it."""

import collections
import itertools

import numpy as np
import pytest

from moepeft.data.tokenizers.tokenizer import ByteTokenizer
from moepeft.inference.constraints.grammar import Compiler

from . import json_cases, small_words
from .json_cases import KINDS, SCHEMAS, UNBOUNDED

pytest.importorskip('llguidance')
jsonschema = pytest.importorskip('jsonschema')
# Tokens of bytes are the most: 24 letters of 'mail' in six bytes each, twice.
MOST = 700
WRONG = jsonschema.ValidationError


class Streams:
  """Random answers of a vocabulary, judged."""

  def __init__(self, words, vocab, ends, texts):
    self.compiler = Compiler(words, vocab, ends)
    self.words, self.ends = words, ends
    self.biases = {kind: json_cases.bias(kind, texts, ends) for kind in KINDS}
    self.judges = {
      name: json_cases.judge(jsonschema, schema)
      for name, schema in SCHEMAS.items()
    }

  def run(self, count, seed):
    """{schema's name: how many were cut}, the others judged."""
    rng, cut = np.random.default_rng(seed), collections.Counter()
    # Every schema with every kind of logits: 30 and 12 with all pairs in 360.
    pairs = itertools.cycle(itertools.product(KINDS, SCHEMAS))
    for kind, name in itertools.islice(pairs, count):
      constraint = self.compiler.json_schema(SCHEMAS[name])
      ids, ended = json_cases.stream(
        constraint, self.ends, self.biases[kind], rng, MOST
      )
      if ended:
        self.judges[name](self.words.decode(ids))
      else:
        cut[name] += 1
    return cut


@pytest.fixture(scope='module')
def learnt(tmp_path_factory):
  words = small_words.saved(tmp_path_factory.mktemp('words'), 'bytes')
  # The model's vocabulary is wider than the tokenizer's.
  vocab = len(words.tokenizer) + 7
  texts = small_words.texts(words, vocab)
  return Streams(words, vocab, (words.eos,), texts)


def of_bytes():
  texts = [b'', b'', b'', *(bytes([i]) for i in range(256))]
  return Streams(ByteTokenizer(), 259, (1,), texts)


def check(cut):
  # Only what has no bound of its own is ever cut, and then for its length.
  assert set(cut) <= set(UNBOUNDED)


def test_there_are_thirty_schemas():
  assert len(SCHEMAS) == 30


@pytest.mark.slow
def test_every_answer_of_learnt_tokens_fits_its_schema(learnt):
  check(learnt.run(360, seed=3))


def test_every_answer_of_bytes_fits_its_schema():
  check(of_bytes().run(120, seed=5))


def test_the_judge_is_no_friend():
  judge = json_cases.judge(jsonschema, SCHEMAS['date'])
  judge('"2024-02-29"')
  for wrong in ('"2023-02-29"', '"2024-02-29" ', '2024', '"2024-2-9"', '"'):
    with pytest.raises(
      (ValueError, AssertionError, jsonschema.ValidationError)
    ):
      judge(wrong)


def test_a_stream_without_masks_does_not_fit(learnt):
  class Free:
    def mask(self):
      return np.ones(len(learnt.biases['nothing']), bool)

    def accept(self, token):
      return False

  rng = np.random.default_rng(7)
  ids, _ = json_cases.stream(
    Free(), learnt.ends, learnt.biases['nothing'], rng, 20
  )
  with pytest.raises((ValueError, WRONG)):
    learnt.judges['booleans'](learnt.words.decode(ids))


@pytest.mark.slow
def test_ten_thousand_answers_fit_their_schemas(learnt, capsys):
  cut = learnt.run(8_000, seed=11) + of_bytes().run(2_000, seed=13)
  check(cut)
  with capsys.disabled():
    print(f'\n10,000 answers, {sum(cut.values())} cut for length: {dict(cut)}')
