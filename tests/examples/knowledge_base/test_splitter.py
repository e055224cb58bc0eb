# SPDX-License-Identifier: Apache-2.0
"""Passages are of whole sentences, bounded, and lose nothing."""

import re

import pytest

from examples.knowledge_base import splitter
from examples.knowledge_base.loaders import Document


def document(text):
  return Document('a.md', 'Title', text)


TEXT = ' '.join(f'Sentence number {i} has seven words here.' for i in range(23))


@pytest.mark.parametrize(('size', 'overlap'), [(11, 0), (37, 0), (37, 13)])
def test_passages_cover_the_text_in_order_within_their_size(size, overlap):
  passages = splitter.split(document(TEXT), size, overlap)
  assert all(splitter.size(p.text) <= size for p in passages)
  lines = [line for p in passages for line in p.text.splitlines()]
  assert list(dict.fromkeys(lines)) == list(splitter.sentences(TEXT))
  shared = sum(
    len(set(a.text.splitlines()) & set(b.text.splitlines()))
    for a, b in zip(passages, passages[1:], strict=False)
  )
  assert (shared > 0) == (overlap > 0)


def test_a_sentence_longer_than_a_passage_is_cut_between_words():
  text = 'word ' * 50
  passages = splitter.split(document(text), 7, 0)
  assert [p.text.split() for p in passages] == [['word'] * 7] * 7 + [['word']]


def test_headings_items_and_chinese_sentences_end():
  text = (
    '# Bolts\nTurn it. Then stop.\n\n- one\n- two\n\n'
    '\u62e7\u7d27\u87ba\u6813\u3002\u505c\u6b62\u3002'
  )
  assert list(splitter.sentences(text)) == [
    *('# Bolts', 'Turn it.', 'Then stop.', '- one', '- two'),
    *('\u62e7\u7d27\u87ba\u6813\u3002', '\u505c\u6b62\u3002'),
  ]


def test_an_abbreviation_before_a_small_letter_is_no_end():
  assert len(list(splitter.sentences('It weighs approx. three kg.'))) == 1


def test_an_overlap_of_half_a_passage_is_refused():
  with pytest.raises(ValueError, match='below half the size'):
    splitter.split(document(TEXT), 20, 10)


def test_terms_are_without_case_accents_and_plural():
  assert splitter.terms('Tablets, CAF\xc9s; queries: bus glass 3.5 mg') == [
    *('tablet', 'cafe', 'query', 'bus', 'glass', '3', '5', 'mg'),
  ]


def test_terms_of_chinese_are_pairs_of_characters():
  assert splitter.terms('\u5957\u9910\u8d39 12') == [
    '\u5957\u9910',
    '\u9910\u8d39',
    '12',
  ]
  assert splitter.terms('\u8d39') == ['\u8d39']


def test_no_term_has_a_character_that_a_query_of_fts5_would_parse():
  text = '"a" OR (b) AND NOT c* ^d {e} : f-g\u00b2'
  assert all(re.fullmatch(r'\w+', term) for term in splitter.terms(text))
