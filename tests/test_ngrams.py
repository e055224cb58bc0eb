# SPDX-License-Identifier: Apache-2.0
"""N-gram baselines of text: probabilities by hand, and the same targets."""

import importlib
import math
import subprocess
import sys

import numpy as np
import pytest

from moepeft import ngrams
from moepeft.data import spans

A, B, C = 0, 1, 2


def probabilities(train, row, order):
  grams = ngrams.NGrams([np.array(r) for r in train], order, size=4)
  return [np.exp(p) for p in grams.log_p([np.array(row)])]


def test_probabilities_are_witten_and_bells():
  # Of a a b among 4 tokens: 3 counted, 2 kinds, each unseen share is 1/4:
  # p(a) = (2 + 2/4) / 5, p(b) = (1 + 2/4) / 5, p(c) = (2/4) / 5. After a, 2
  # counted of 2 kinds: p(b|a) = (1 + 2 p(b)) / 4, p(c|a) = 2 p(c) / 4. Nothing
  # follows b, so after it p is that of a single token.
  one, two = probabilities([[A, A, B]], [A, B, C], 2)
  np.testing.assert_allclose(one, [0.5, 0.3, 0.1])
  np.testing.assert_allclose(two, [0.5, 0.4, 0.1])
  (_, after_a) = probabilities([[A, A, B]], [A, C], 2)
  np.testing.assert_allclose(after_a, [0.5, 0.05])


def test_probabilities_add_up_to_one_in_every_context():
  train = np.random.default_rng(0).integers(0, 3, (3, 17))
  for context in ([], [A], [B, A], [C, C, C], [3, A, B]):
    found = [probabilities(train, [*context, t], 4) for t in range(4)]
    for n in range(4):
      total = sum(p[n][-1] for p in found)
      np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_nothing_is_counted_or_seen_across_rows():
  apart = probabilities([[A, B], [C, A]], [C], 3)
  np.testing.assert_allclose(apart[0], apart[1])
  # b is followed by nothing: the next row's c does not follow it.
  one, two = probabilities([[A, B], [C, A]], [B, C], 3)
  np.testing.assert_allclose(one[1], two[1])
  # And c is followed by a, in its own row.
  one, two = probabilities([[A, B], [C, A]], [C, A], 3)
  assert two[1] > one[1]


def test_ends_of_spans_are_told_from_their_lengths():
  # Of spans of 1, 1 and 3: 2 of 3 end at 1, 0 of 1 at 2, 1 of 1 at 3; one
  # that ends and one that goes on are added.
  p = ngrams.ends([1, 1, 3], 3)
  np.testing.assert_allclose(p, [3 / 5, 1 / 3, 2 / 3])
  nats = ngrams.ends_nats([1, 2], p)
  np.testing.assert_allclose(nats, -math.log(3 / 5 * 2 / 5 * 1 / 3))


@pytest.mark.parametrize('seed', range(5))
def test_hidden_spans_are_put_back(seed):
  rng = np.random.default_rng(seed)
  ids = rng.integers(10, 20, 37).astype(np.int32)
  hidden = spans.mask(37, 0.3, 3.0, rng)
  pair = spans.corrupt(ids, hidden, list(range(99, 79, -1)), 1)
  found, again = spans.restore(*pair, list(range(99, 79, -1)))
  np.testing.assert_array_equal(found, ids)
  np.testing.assert_array_equal(again, hidden)
  one = ngrams.row(pair, 'spans', list(range(99, 79, -1)))
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
  c.data.predict, c.data.held_out = predict, 0.25
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
  command = [sys.executable, '-m', 'moepeft.ngrams', '--order=3']
  command += [f'--config=configs/pretrain_gpt_tiny.py:text={file}']
  found = subprocess.run(command, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  assert [line.split()[0] for line in found.stdout.splitlines()[1:]] == [
    '1-gram',
    '2-gram',
    '3-gram',
  ]
