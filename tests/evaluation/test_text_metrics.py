# SPDX-License-Identifier: Apache-2.0
"""Measures of generated texts: the libraries' figures, and known cases."""

import sys

import pytest

from moepeft.evaluation import text_metrics

# (prediction, target): equal, partly, empty, accents, several lines.
PAIRS = [
  ('the cat sat on the mat', 'the cat sat on the mat'),
  ('the cats were sitting there', 'a cat sits there, on the mat'),
  ('', 'something was expected'),
  ('something was said', ''),
  ('', '...'),
  ('Zoë naïvely ate 3 crêpes', 'Zoe naively ate three crêpes'),
  ('first line\nsecond one here', 'second one here\nfirst line'),
]
SAID, MEANT = map(list, zip(*PAIRS, strict=True))
MEASURES = [text_metrics.exact_match, text_metrics.rouge_l, text_metrics.bleu]


def test_rouge_l_is_that_of_rouge_score():
  from rouge_score import rouge_scorer

  theirs = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)
  expected = [
    theirs.score(target=target, prediction=said)['rougeL'].fmeasure
    for said, target in PAIRS
  ]
  assert text_metrics.rouge_l(SAID, MEANT) == expected
  assert len(set(expected)) > 3


def test_bleu_is_that_of_sacrebleu():
  import sacrebleu

  expected = sacrebleu.corpus_bleu(SAID, [MEANT])
  assert text_metrics.bleu(SAID, MEANT) == expected.score
  assert 0 < expected.score < 100
  other = sacrebleu.corpus_bleu(SAID, [MEANT], tokenize='char')
  assert text_metrics.bleu(SAID, MEANT, 'char') == other.score != expected.score


def test_rouge_l_by_hand():
  # The longest common subsequence of (the, cat, sat, down) and (the, black,
  # cat, sat, on, it) has 3 words: precision 3 / 4, recall 3 / 6, F 0.6.
  (found,) = text_metrics.rouge_l(
    ['the cat sat down'], ['The black cat sat on it.']
  )
  assert found == pytest.approx(0.6)


def test_rouge_l_goes_over_line_breaks():
  # As whole texts, two of (x1, y1) and (y1, x1) are in other orders: 1 / 2.
  # Line by line (rougeLsum) each would be found: 1.
  assert text_metrics.rouge_l(['x1\ny1'], ['y1\nx1']) == [0.5]
  assert text_metrics.rouge_l(['x1\ny1'], ['x1 y1']) == [1]


def test_rouge_l_stems_words():
  assert text_metrics.rouge_l(['walking'], ['walked']) == [1]


def test_rouge_l_of_chinese_is_by_character():
  # All 5 characters said are of the 6 meant, in their order: precision 1,
  # recall 5 / 6, F 2 * 5/6 / (11/6) = 10 / 11.
  assert text_metrics.rouge_l(['我喜欢苹果'], ['我喜欢红苹果']) == [
    pytest.approx(10 / 11)
  ]
  # (gpt, 好) of (gpt, 很, 好): precision 1, recall 2 / 3, F 4 / 5.
  assert text_metrics.rouge_l(['GPT好'], ['gpt 很好。']) == [pytest.approx(0.8)]
  # か of (か, な), and 한 of (한, 글): 1 / 2 each.
  assert text_metrics.rouge_l(['かに', '한국'], ['かな', '한글']) == [0.5, 0.5]
  assert text_metrics.rouge_l(['something else'], ['你好']) == [0]


def test_rouge_l_of_a_script_that_it_does_not_count_is_refused():
  with pytest.raises(ValueError, match="the target 'привет' has none") as error:
    text_metrics.rouge_l(['привет', 'a'], ['привет', 'a'])
  assert '\n' not in str(error.value)
  # What is no letter has no script, and what is said is not chosen.
  assert text_metrics.rouge_l(['привет', '?'], ['yes', '?']) == [0, 0]


def test_bleu_of_the_same_is_100_and_of_nothing_0():
  assert text_metrics.bleu(MEANT[:2], MEANT[:2]) == pytest.approx(100)
  assert text_metrics.bleu([''], MEANT[:1]) == 0


def test_bleu_by_hand():
  # 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 runs of them are the target's, and
  # it is as long: (4/5 * 3/4 * 2/3 * 1/2) ** (1/4) = (1/5) ** (1/4).
  found = text_metrics.bleu(['a b c d x'], ['a b c d e'])
  assert found == pytest.approx(100 * 0.2**0.25)


def test_bleu_is_told_with_how_it_was_counted():
  import sacrebleu

  expected = (
    f'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:'
    f'{sacrebleu.__version__}'
  )
  assert text_metrics.bleu_signature() == expected
  assert '|tok:zh|' in text_metrics.bleu_signature('zh')


def test_exact_match_forgives_white_space_at_the_ends_and_nothing_else():
  said = ['yes', 'yes\n', 'Yes', 'yes.', 'the yes', 'ye s', '', '是', 'a\nb']
  meant = [' yes ', 'yes', 'yes', 'yes', 'yes', 'yes', '', '是', 'a b']
  # Case, a full stop, an article and space within are differences.
  assert text_metrics.exact_match(said, meant) == [1, 1, 0, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize('measure', MEASURES)
def test_what_is_no_list_of_pairs_is_refused(measure):
  with pytest.raises(ValueError, match='got 2 predictions and 1 targets'):
    measure(['a', 'b'], ['a'])
  with pytest.raises(ValueError, match='got 0 predictions and 0 targets'):
    measure([], [])


@pytest.mark.parametrize(
  'library, measure',
  [('rouge_score.rouge_scorer', 'rouge_l'), ('sacrebleu.metrics', 'bleu')],
)
def test_a_missing_library_is_named_with_what_brings_it(
  library, measure, monkeypatch
):
  monkeypatch.setitem(sys.modules, library, None)
  with pytest.raises(ValueError, match=f'{measure} .*moepeft.eval.') as error:
    getattr(text_metrics, measure)(['a'], ['a'])
  assert len(str(error.value).splitlines()) == 1
  # Exact match needs neither.
  assert text_metrics.exact_match(['a'], ['a']) == [1]
