# SPDX-License-Identifier: Apache-2.0
"""Rules of quality and near duplicates leave parts of texts out."""

import importlib.util

import pytest

from moepeft import config as config_lib
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.text import dataset as text_dataset
from moepeft.data.text import dedup, quality
from moepeft.data.tokenizers.tokenizer import ByteTokenizer

GOOD = ' '.join(f'word{i}' for i in range(58)) + ' of the'
NEEDS = pytest.mark.skipif(
  importlib.util.find_spec('datasketch') is None, reason='needs datasketch'
)


@pytest.mark.parametrize(
  ('name', 'bad'),
  [
    # 49 words; the least is 50.
    ('length', 'word ' * 49),
    # Of 2 letters in the mean; the least is 3.
    ('words', 'ab ' * 60),
    # 7 of 60 words; the most is a tenth.
    ('symbols', 'good #tag ' * 7 + 'good ' * 46),
    # 13 of 60 words without a letter; the most is a fifth.
    ('letters', 'word ' * 47 + '123 ' * 13),
    ('stopwords', 'the ' * 60),
    # 10 of 11 lines; the most is 90 %.
    ('lines', '- one\n' * 10 + 'two'),
    # 4 of 11 lines end so; the most is 30 %.
    ('lines', 'so...\n' * 4 + 'one\n' * 7),
    # 4 of 11 lines were there before; the most is 30 %.
    ('repetition', 'same\n' * 5 + ''.join(f'l{i}\n' for i in range(6))),
    # 'ab cd' 3 times: 12 of 30 letters; the most is a fifth.
    ('repetition', 'ab cd e1 ab cd e2 ab cd ' + 'abc def ghi jkl mn'),
  ],
)
def test_each_rule_keeps_good_text_and_leaves_out_its_fault(name, bad):
  (holds,) = quality.rules(name).values()
  assert holds(GOOD) and not holds(bad)


def test_rules_are_named():
  assert list(quality.rules('words, length')) == ['words', 'length']
  assert quality.rules('') == {}
  with pytest.raises(ValueError, match="length, words, .*; got 'short'"):
    quality.rules('short')


def words(start, count=60):
  return ' '.join(f'w{i}' for i in range(start, start + count))


def test_similarity_is_of_five_words_in_a_row():
  # 56 shingles each; the last 46 of one are the first of the other.
  one, two = dedup.shingles(words(0)), dedup.shingles(words(10))
  assert len(one) == 56
  assert dedup.jaccard(one, two) == 46 / 66
  assert dedup.shingles('A b') == {'a b'}


@NEEDS
def test_the_first_of_near_duplicates_stays():
  texts = [words(0), words(500), words(1), words(0), words(30)]
  # 55 shared of 57; 56 of 56; 26 of 86.
  actual = dedup.near_duplicates(texts, 0.8)
  assert actual == [False, False, True, True, False]
  assert actual == dedup.near_duplicates(texts, 0.8)
  assert dedup.near_duplicates(texts, 1.0) == [False, False, False, True, False]


@NEEDS
def test_what_goes_is_counted_and_told(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('\n'.join([GOOD, words(0), words(1), 'too short', GOOD]))
  data = config_lib.default().data
  data.source, data.path = 'text', str(path)
  data.quality_filters, data.dedup_threshold = 'length', 0.8
  actual = text_dataset.read_chunks(
    data, CausalCollator(ByteTokenizer(), 31), str(path)
  )
  shown = ByteTokenizer().decode(actual.ids.tolist())
  assert shown == f'{GOOD}\n{words(0)}'
  assert actual.notes[:2] == (
    "1 passages fail the rule 'length' (50 to 100,000 words)",
    '2 passages are near duplicates (similarity 0.8)',
  )
  path.write_text('short')
  with pytest.raises(ValueError, match='no passage of 1 remains'):
    text_dataset.read_chunks(
      data, CausalCollator(ByteTokenizer(), 31), str(path)
    )


def test_a_similarity_is_a_share():
  with pytest.raises(ValueError, match='Jaccard similarity above 0'):
    dedup.near_duplicates(['a'], 1.5)
