# SPDX-License-Identifier: Apache-2.0
"""N-gram baselines of text: probabilities by hand, and the same targets."""

import importlib
import math

import numpy as np
import pytest

from moepeft.data.text import span_corruption
from moepeft.evaluation import ngrams

from .. import commands

A, B, C = 0, 1, 2


def probabilities(train, row, order):
  grams = ngrams.NGrams([np.array(r) for r in train], order, size=4)
  return [np.exp(p) for p in grams.log_p([np.array(row)])]


def test_probabilities_are_kneser_and_neys():
  # Of a a b among 4 tokens single ones are counted 2 and 1 times, once 1 of 1
  # + 2 * 1, a discount of 1/3: p(a) = (2 - 1/3 + 1/3 * 2 / 4) / 3, p(b) =
  # (1 - 1/3 + 1/6) / 3, p(c) = (1/6) / 3.
  one, two = probabilities([[A, A, B]], [A, B, C], 2)
  np.testing.assert_allclose(one, [11 / 18, 5 / 18, 1 / 18])
  # Of pairs, and of what came before a and b (an a, both), all were counted
  # once: the discount is the largest, 0.9. By what came before, p(a) = p(b) =
  # (1 - 0.9 + 0.9 * 2 / 4) / 2 = 0.275 and p(c) = 0.225, so p(b|a) = (1 - 0.9
  # + 0.9 * 2 * 0.275) / 2. Nothing follows b. The first token stands alone.
  np.testing.assert_allclose(two, [11 / 18, 0.2975, 0.225])
  (_, after_a) = probabilities([[A, A, B]], [A, C], 2)
  np.testing.assert_allclose(after_a[1], 0.9 * 0.225)


def test_probabilities_add_up_to_one_in_every_context():
  train = np.random.default_rng(0).integers(0, 3, (3, 17))
  for context in ([], [A], [B, A], [C, C, C], [3, A, B]):
    actual = [probabilities(train, [*context, t], 4) for t in range(4)]
    for n in range(4):
      total = sum(p[n][-1] for p in actual)
      np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_nothing_is_counted_or_seen_across_rows():
  # a starts both rows and follows c: had b been seen before c, it would be
  # less likely there.
  together = probabilities([[A, B, C, A]], [B, C], 2)[1]
  apart = probabilities([[A, B], [C, A]], [B, C], 2)[1]
  assert apart[1] < together[1]
  # A row's first token is as likely whatever stood in the row before.
  grams = ngrams.NGrams([np.array([A, B, C, A])], 3, size=4)
  alone, after = (
    grams.log_p([np.array(r) for r in rows]) for rows in ([[C]], [[A, B], [C]])
  )
  for n in range(3):
    assert alone[n][0] == after[n][2]


def test_ends_of_spans_are_told_from_their_lengths():
  # Of spans of 1, 1 and 3: 2 of 3 end at 1, 0 of 1 at 2, 1 of 1 at 3; one
  # that ends and one that goes on are added.
  p = ngrams.span_end_probs([1, 1, 3], 3)
  np.testing.assert_allclose(p, [3 / 5, 1 / 3, 2 / 3])
  nats = ngrams.span_ends_nll([1, 2], p)
  np.testing.assert_allclose(nats, -math.log(3 / 5 * 2 / 5 * 1 / 3))


@pytest.mark.parametrize('seed', range(5))
def test_hidden_spans_are_put_back(seed):
  rng = np.random.default_rng(seed)
  ids = rng.integers(10, 20, 37).astype(np.int32)
  hidden = span_corruption.noise_mask(37, 0.3, 3.0, rng)
  pair = span_corruption.corrupt(ids, hidden, list(range(99, 79, -1)), 1)
  actual, again = span_corruption.restore(*pair, list(range(99, 79, -1)))
  np.testing.assert_array_equal(actual, ids)
  np.testing.assert_array_equal(again, hidden)
  one = ngrams.predicted_text(pair, 'spans', list(range(99, 79, -1)))
  # Every target is scored once: the first sentinel, tokens, ends and EOS.
  assert one.targets == len(pair[1])
  assert sum(one.spans) == hidden.sum()


def config(tmp_path, name, text='the cat sat on the mat.\n\n' * 400):
  file = tmp_path / 'text.txt'
  file.write_text(text)
  return importlib.import_module(f'configs.{name}').get_config(f'text={file}')


@pytest.mark.parametrize(
  'name, predict',
  [
    ('pretrain_gpt_tiny', 'next'),
    ('pretrain_gpt_tiny', 'prefix'),
    ('pretrain_t5_tiny', 'spans'),
    ('pretrain_t5_tiny', 'prefix'),
  ],
)
def test_more_context_tells_more_of_text_that_repeats(tmp_path, name, predict):
  c = config(tmp_path, name)
  c.data.pretraining_objective, c.data.validation_fraction = predict, 0.25
  targets, nats = ngrams.baseline(c, 6)
  assert targets > 0
  # 12 different bytes, and after six in a row there is one way on.
  assert nats[5] < 0.3 * nats[0]
  assert math.log(5) < nats[0] < math.log(25)


def test_only_text_has_a_baseline(tmp_path):
  c = config(tmp_path, 'pretrain_gpt_tiny')
  c.data.source = 'chat'
  with pytest.raises(ValueError, match="config.data.source='text'"):
    ngrams.baseline(c, 2)


def test_the_command_prints_a_line_for_each_n(tmp_path):
  file = tmp_path / 'text.txt'
  file.write_text('the cat sat on the mat.\n\n' * 300)
  actual = commands.run(
    'moepeft.ngrams',
    '--order=3',
    f'--config=configs/pretrain_gpt_tiny.py:text={file}',
  )
  assert actual.returncode == 0, actual.stderr
  assert [line.split()[0] for line in actual.stdout.splitlines()[1:]] == [
    '1-gram',
    '2-gram',
    '3-gram',
  ]
