# SPDX-License-Identifier: Apache-2.0
"""Rows of decoder-only models: what stands where, and what is trained."""

import numpy as np
import pytest

from moepeft.data.batching import packing
from moepeft.data.batching.decoder_only import (
  CausalCollator,
  Sample,
  keep_last,
  make_sample,
  pack_samples,
  pad_samples,
  truncate,
)
from moepeft.data.preference import tokenize as preference_tokenize
from moepeft.data.tokenizers.tokenizer import (
  ByteTokenizer,
  HuggingFaceTokenizer,
)
from moepeft.tasks import Example

from ... import chat_cases


def one(*ids, prompt=0):
  return make_sample(ids[:prompt], ids[prompt:])


def test_a_target_is_the_token_that_follows():
  rows = pad_samples([one(5, 6, 7, 8, prompt=2)], 5)
  np.testing.assert_array_equal(rows['inputs'], [[5, 6, 7, 0, 0]])
  np.testing.assert_array_equal(rows['targets'], [[6, 7, 8, 0, 0]])
  # 7 and 8 are the answer.
  np.testing.assert_array_equal(rows['targets_mask'], [[0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(rows['inputs_mask'], [[1, 1, 1, 0, 0]])


def test_an_example_becomes_its_inputs_a_line_end_its_targets_and_eos():
  form = CausalCollator(ByteTokenizer(), 7)
  (actual,) = form.encode([Example('t', '', 0, 'ab', 'c', (), -1)])
  # Bytes plus 3: a 100, b 101, the line's end 13, c 102; EOS is 1.
  assert actual.ids.tolist() == [100, 101, 13, 102, 1]
  assert actual.loss_mask.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
  ('truncation', 'ids', 'trained'),
  [
    # Of 2 3 4 | 5 6 in 4: the prompt's first goes, or the answer's last.
    ('prompt', [3, 4, 5, 6], [0, 0, 1, 1]),
    ('end', [2, 3, 4, 5], [0, 0, 0, 1]),
  ],
)
def test_what_is_too_long_loses_what_is_asked(truncation, ids, trained):
  actual = truncate(one(2, 3, 4, 5, 6, prompt=3), 4, truncation)
  assert actual.ids.tolist() == ids
  np.testing.assert_array_equal(actual.loss_mask, np.array(trained, bool))
  assert actual.cut


@pytest.mark.parametrize(
  ('most', 'ids'),
  [
    # 0 begins texts: of 0 2 3 4 | 5 6 it stays, and what is next goes.
    (5, [0, 3, 4, 5, 6]),
    (3, [0, 5, 6]),
    # Then the answer loses its end.
    (2, [0, 5]),
  ],
)
def test_what_begins_every_text_stays(most, ids):
  actual = truncate(one(0, 2, 3, 4, 5, 6, prompt=4), most, 'prompt', bos=0)
  assert actual.ids.tolist() == ids
  assert actual.loss_mask.tolist() == [i > 4 for i in ids]
  assert keep_last(np.array([0, 2, 3, 4]), 3, 0).tolist() == [0, 3, 4]
  assert keep_last(np.array([0, 2, 3, 4]), 3, None).tolist() == [2, 3, 4]
  assert keep_last(np.array([0, 2, 3]), 3, 0).tolist() == [0, 2, 3]


def test_a_tokenizer_s_beginning_stays_in_rows_and_prompts(tmp_path):
  made = chat_cases.learnt('bytes', bos=True)
  made.save_pretrained(tmp_path)
  words = HuggingFaceTokenizer(str(tmp_path))
  texts = Example('t', '', 0, 'again ' * 9, 'mat', (), -1)
  (actual,) = CausalCollator(words, 7).encode([texts])
  assert actual.cut and actual.ids[0] == words.bos == made.bos_token_id
  assert (actual.ids == words.bos).sum() == 1
  parts = preference_tokenize.EncodedAnswers(
    np.array([words.bos, *range(50, 60)]),
    ((np.array([61]), np.ones(1, bool)),) * 2,
  )
  cut = preference_tokenize.fit_answers(
    parts, CausalCollator(words, 7), 'prompt'
  )
  # Eight ids a row, one of them the answer's.
  assert cut.prompt.tolist() == [words.bos, *range(54, 60)]


def test_an_answer_longer_than_a_row_keeps_its_beginning():
  actual = truncate(one(2, 3, 4, 5, 6, 7, prompt=2), 3, 'prompt')
  # One token before it stays: the first of the answer follows it.
  assert actual.ids.tolist() == [3, 4, 5]


def test_what_texts_begin_with_stays_before_a_prompt_that_is_cut():
  # Of 9 2 3 4 | 5 6 in 5 goes 2; of 9 2 | 5 6 7 in 3 all that can.
  actual = truncate(one(9, 2, 3, 4, 5, 6, prompt=4), 5, 'prompt', 9)
  assert actual.ids.tolist() == [9, 3, 4, 5, 6]
  assert actual.loss_mask.tolist() == [False, False, False, True, True]
  actual = truncate(one(9, 2, 5, 6, 7, prompt=2), 3, 'prompt', 9)
  assert actual.ids.tolist() == [9, 5, 6]
  # Without it, or where the text begins otherwise, the first goes.
  for bos in (None, 8):
    actual = truncate(one(9, 2, 3, 4, 5, 6, prompt=4), 5, 'prompt', bos)
    assert actual.ids.tolist() == [2, 3, 4, 5, 6]
  # b 101, the line's end 13, c 102; EOS is 1.
  form = CausalCollator(ByteTokenizer(bos=2), 4)
  (made,) = form.encode([Example('t', '', 0, 'ab', 'c', (), -1)])
  assert made.ids.tolist() == [2, 101, 13, 102, 1]


def test_what_has_nothing_left_to_train_is_dropped():
  long = one(2, 3, 4, 5, prompt=3)
  assert truncate(long, 3, 'end') is None
  assert truncate(long, 3, 'drop') is None
  form = CausalCollator(ByteTokenizer(), 2, truncation='drop')
  with pytest.raises(ValueError, match='raise the length'):
    form.encode([long])


def test_packed_rows_hold_every_sample_once_with_places_of_its_own():
  rng = np.random.default_rng(0)
  sizes = rng.integers(2, 12, 97)
  samples = [
    Sample(rng.integers(2, 90, n).astype(np.int32), rng.random(n) < 0.5)
    for n in sizes
  ]
  lengths = np.array([[len(one.ids) - 1] for one in samples])
  rows = pack_samples(samples, 13, packing.shuffled_bins(lengths, (13,), rng))
  actual = []
  for row in range(len(rows['inputs'])):
    segments = rows['inputs_segments'][row]
    for segment in range(1, segments.max() + 1):
      own = segments == segment
      assert np.all(np.diff(np.flatnonzero(own)) == 1)
      places = rows['inputs_positions'][row][own]
      np.testing.assert_array_equal(places, np.arange(own.sum()))
      ids = [*rows['inputs'][row][own], rows['targets'][row][own][-1]]
      actual.append((ids, rows['targets_mask'][row][own].tolist()))
  expected = [(s.ids.tolist(), s.loss_mask[1:].tolist()) for s in samples]
  assert sorted(actual) == sorted(expected)
  np.testing.assert_array_equal(
    rows['inputs_mask'], rows['inputs_segments'] > 0
  )
  # Best fit wastes less than a tenth here; a sample a row wastes half.
  assert rows['inputs_mask'].mean() > 0.9


def test_a_policy_that_is_none_is_refused():
  with pytest.raises(ValueError, match='prompt, end, drop'):
    CausalCollator(ByteTokenizer(), 7, truncation='middle')
