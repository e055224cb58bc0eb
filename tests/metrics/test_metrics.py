# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated texts: the libraries' scores, and known cases."""

import sys

import pytest

from moepeft.metrics import METRICS, TextMetric
from moepeft.metrics import bleu as bleu_lib
from moepeft.metrics.bleu import bleu
from moepeft.metrics.exact_match import exact_match
from moepeft.metrics.rouge_l import rouge_l

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
PREDICTIONS, TARGETS = map(list, zip(*PAIRS, strict=True))


def test_rouge_l_is_that_of_rouge_score():
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)
  expected = [
    scorer.score(target=target, prediction=prediction)['rougeL'].fmeasure
    for prediction, target in PAIRS
  ]
  assert rouge_l(PREDICTIONS, TARGETS) == expected
  assert len(set(expected)) > 3


def test_bleu_is_that_of_sacrebleu():
  import sacrebleu

  expected = sacrebleu.corpus_bleu(PREDICTIONS, [TARGETS])
  assert bleu(PREDICTIONS, TARGETS) == expected.score
  assert 0 < expected.score < 100
  by_character = sacrebleu.corpus_bleu(PREDICTIONS, [TARGETS], tokenize='char')
  score = bleu(PREDICTIONS, TARGETS, 'char')
  assert score == by_character.score != expected.score


def test_rouge_l_by_hand():
  # The longest common subsequence of (the, cat, sat, down) and (the, black,
  # cat, sat, on, it) has 3 words: precision 3 / 4, recall 3 / 6, F 0.6.
  (score,) = rouge_l(['the cat sat down'], ['The black cat sat on it.'])
  assert score == pytest.approx(0.6)


def test_rouge_l_goes_over_line_breaks():
  # As whole texts, two of (x1, y1) and (y1, x1) are in other orders: 1 / 2.
  # Line by line (rougeLsum) each would be found: 1.
  assert rouge_l(['x1\ny1'], ['y1\nx1']) == [0.5]
  assert rouge_l(['x1\ny1'], ['x1 y1']) == [1]


def test_rouge_l_stems_words():
  assert rouge_l(['walking'], ['walked']) == [1]


def test_rouge_l_of_chinese_is_by_character():
  # All 5 characters predicted are of the 6 of the target, in their order:
  # precision 1, recall 5 / 6, F 2 * 5/6 / (11/6) = 10 / 11.
  assert rouge_l(['我喜欢苹果'], ['我喜欢红苹果']) == [pytest.approx(10 / 11)]
  # (gpt, 好) of (gpt, 很, 好): precision 1, recall 2 / 3, F 4 / 5.
  assert rouge_l(['GPT好'], ['gpt 很好。']) == [pytest.approx(0.8)]
  # か of (か, な), and 한 of (한, 글): 1 / 2 each.
  assert rouge_l(['かに', '한국'], ['かな', '한글']) == [0.5, 0.5]
  assert rouge_l(['something else'], ['你好']) == [0]


def test_rouge_l_refuses_a_script_that_it_does_not_count():
  evaluate = METRICS['rouge_l'].evaluate
  with pytest.raises(ValueError, match="the target 'привет' has none") as error:
    evaluate(['привет', 'a'], ['привет', 'a'])
  assert '\n' not in str(error.value)
  # A text without letters has no script; a prediction may have any.
  assert evaluate(['привет', '?'], ['yes', '?']) == ([0, 0], None)


def test_bleu_of_equal_texts_is_100_and_of_an_empty_one_0():
  assert bleu(TARGETS[:2], TARGETS[:2]) == pytest.approx(100)
  assert bleu([''], TARGETS[:1]) == 0


def test_bleu_by_hand():
  # 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 runs of them are the target's, and
  # it is as long: (4/5 * 3/4 * 2/3 * 1/2) ** (1/4) = (1/5) ** (1/4).
  score = bleu(['a b c d x'], ['a b c d e'])
  assert score == pytest.approx(100 * 0.2**0.25)


def test_bleus_signature_has_its_settings_and_version():
  import sacrebleu

  expected = (
    f'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:'
    f'{sacrebleu.__version__}'
  )
  assert METRICS['bleu'].signature() == expected
  assert '|tok:zh|' in bleu_lib.signature('zh')


def test_exact_match_forgives_white_space_at_the_ends_alone():
  predictions = ['yes', 'yes\n', 'Yes', 'yes.', 'the yes', 'ye s', '', '是']
  targets = [' yes ', 'yes', 'yes', 'yes', 'yes', 'yes', '', '是']
  # Case, a full stop, an article and space within are differences.
  assert exact_match(predictions, targets) == [1, 1, 0, 0, 0, 0, 1, 1]
  assert exact_match(['a\nb'], ['a b']) == [0]


@pytest.mark.parametrize('name', METRICS)
def test_a_metric_scores_examples_or_a_corpus_within_its_bounds(name):
  metric = METRICS[name]
  scores, corpus_score = metric.evaluate(PREDICTIONS, TARGETS)
  assert (scores is None) != (corpus_score is None)
  if scores is not None:
    assert len(scores) == len(TARGETS)
    # Each example for itself: an order or a batch changes no score.
    reverse, _ = metric.evaluate(PREDICTIONS[::-1], TARGETS[::-1])
    assert reverse[::-1] == scores
  low, high = metric.bounds
  shown = [metric.factor * s for s in scores or [corpus_score]]
  assert all(low <= number <= high for number in shown)
  perfect, perfect_corpus = metric.evaluate(TARGETS[:3], TARGETS[:3])
  best = high if metric.larger_is_better else low
  for score in perfect or [perfect_corpus]:
    assert metric.factor * score == pytest.approx(best)


@pytest.mark.parametrize('name', METRICS)
def test_lists_of_other_lengths_and_empty_ones_are_refused(name):
  evaluate = METRICS[name].evaluate
  with pytest.raises(ValueError, match='got 2 predictions and 1 targets'):
    evaluate(['a', 'b'], ['a'])
  with pytest.raises(ValueError, match='got 0 predictions and 0 targets'):
    evaluate([], [])


@pytest.mark.parametrize(
  'library, name',
  [('rouge_score.rouge_scorer', 'rouge_l'), ('sacrebleu.metrics', 'bleu')],
)
def test_a_missing_library_is_named_with_its_extra(library, name, monkeypatch):
  monkeypatch.setitem(sys.modules, library, None)
  with pytest.raises(ValueError, match='moepeft.eval.') as error:
    METRICS[name].evaluate(['a'], ['a'])
  assert METRICS[name].label in str(error.value)
  assert len(str(error.value).splitlines()) == 1
  # Exact match needs neither.
  assert METRICS['exact_match'].evaluate(['a'], ['a']) == ([1], None)


def test_an_entry_without_a_function_or_with_two_is_refused():
  with pytest.raises(ValueError, match='one of scores and corpus_score'):
    TextMetric(label='x')
  with pytest.raises(ValueError, match='one of scores and corpus_score'):
    TextMetric(label='x', scores=exact_match, corpus_score=bleu)
