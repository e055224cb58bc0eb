# SPDX-License-Identifier: Apache-2.0
"""The paper's measure by hand."""

import dataclasses

import numpy as np
import pytest

from moepeft.evaluation import paper_metric, results

from . import cases
from .cases import right, row

# Right answers of ten examples, in each prompt; majorities of 0.5.
PAPERS = {
  'anli_r1': (1, 2, 6),  # 0.2
  'anli_r2': (3, 4),  # 0.35
  'anli_r3': (5,),  # 0.5
  'cb': (9, 1, 2, 4),  # 0.3
  'rte': (7,),
  'wsc': (6,),
  'wic': (5,),
  'copa': (8, 8),
  'winogrande': (5, 6),  # 0.55
  'hellaswag': (3,),
}


def papers(leave_out=()):
  return [
    row(task, f'prompt {i}', right(of, 10))
    for task, prompts in PAPERS.items()
    for i, of in enumerate(prompts)
    if task not in leave_out
  ]


def test_a_task_s_score_is_the_median_over_its_prompts():
  actual = paper_metric.scores(papers())
  # Of four, the mean of the middle two: (0.2 + 0.4) / 2; not the mean 0.4.
  assert actual['cb'].value == pytest.approx(0.3)
  assert actual['winogrande'].value == pytest.approx(0.55)


def test_anli_is_the_mean_of_its_rounds_and_the_average_is_over_eight():
  actual = paper_metric.scores(papers())
  assert tuple(actual) == (*paper_metric.EIGHT, 'average')
  # (0.2 + 0.35 + 0.5) / 3.
  assert actual['anli'].value == pytest.approx(0.35)
  # (0.35 + 0.3 + 0.7 + 0.6 + 0.5 + 0.8 + 0.55 + 0.3) / 8 = 4.1 / 8.
  assert actual['average'].value == pytest.approx(0.5125)


def test_anli_weighs_its_rounds_alike_however_many_prompts_they_have():
  some = [
    row('anli_r1', 'a', right(1, 10)),
    row('anli_r1', 'b', right(1, 10)),
    row('anli_r1', 'c', right(1, 10)),
    row('anli_r2', 'a', right(4, 10)),
    row('anli_r3', 'a', right(7, 10)),
  ]
  # (0.1 + 0.4 + 0.7) / 3, not the prompts' median 0.1 nor their mean 0.28.
  assert paper_metric.scores(some)['anli'].value == pytest.approx(0.4)


def test_there_is_no_average_of_less_than_the_eight():
  actual = paper_metric.scores(papers(leave_out=('copa',)))
  assert 'average' not in actual and 'copa' not in actual
  # Nor is there an ANLI of two rounds: they stand by themselves.
  actual = paper_metric.scores(papers(leave_out=('anli_r2',)))
  assert 'average' not in actual and 'anli' not in actual
  assert actual['anli_r3'].value == 0.5


def test_the_average_of_other_tasks_is_the_mean_of_them():
  actual = paper_metric.scores(
    [
      row('b', 'x', right(1, 10)),
      row('a', 'x', right(2, 10)),
      row('a', 'y', right(4, 10)),
      row('a', 'z', right(5, 10)),
    ]
  )
  assert list(actual) == ['a', 'b', 'average']
  assert actual['average'].value == pytest.approx((0.4 + 0.1) / 2)


def test_majorities_are_medians_and_means_too():
  some = [
    row('a', 'x', right(1, 10), majority=0.6),
    row('a', 'y', right(1, 10), majority=0.9),
    row('a', 'z', right(1, 10), majority=0.7),
    row('b', 'x', right(1, 10), majority=0.5),
  ]
  actual = paper_metric.scores(some)
  assert actual['a'].majority == pytest.approx(0.7)
  assert actual['average'].majority == pytest.approx(0.6)


@pytest.mark.parametrize(
  ('labels', 'expected'),
  [([0, 1, 1], 2 / 3), ([0, 1, 1, 0], 1 / 2), ([2, 0, 1], 1 / 3), ([4], 1)],
)
def test_a_majority_is_the_share_of_the_most_frequent_label(labels, expected):
  assert results.majority(labels) == pytest.approx(expected)


def test_prompts_of_a_task_are_resampled_together():
  # The second prompt is right where the first is wrong: their median, the
  # mean of the two, is 1/2 in every draw, though both have intervals.
  each = right(3, 7)
  pair = [row('a', 'x', each), row('a', 'y', [1 - i for i in each])]
  assert pair[0].high - pair[0].low > 0.5
  actual = paper_metric.scores(pair)['a']
  assert (actual.low, actual.high) == pytest.approx((0.5, 0.5))


def test_runs_on_the_same_examples_are_drawn_alike():
  better = [row('a', 'x', [1, 1, 1, 0, 0, 1, 0], idx=range(7))]
  # The other is wrong in one example more, and its rows come in another order.
  worse = [row('a', 'x', [0, 1, 0, 0, 1, 0, 1], idx=range(7)[::-1])]
  first, second = (
    paper_metric.draws(better)['a'],
    paper_metric.draws(worse)['a'],
  )
  assert first.shape == (2000,)
  # At most as good in every draw: without pairing they would cross.
  assert np.all(first >= second - 1e-12) and np.any(first > second)


def test_the_average_resamples_all_tasks():
  actual = paper_metric.draws(papers())
  parts = [actual[name] for name in paper_metric.EIGHT]
  np.testing.assert_allclose(actual['average'], np.mean(parts, axis=0))
  score = paper_metric.scores(papers())['average']
  assert (score.low, score.high) == pytest.approx(
    tuple(np.percentile(actual['average'], (2.5, 97.5)))
  )


def test_the_order_of_rows_moves_nothing():
  assert paper_metric.scores(papers()) == paper_metric.scores(papers()[::-1])


def test_what_has_no_figures_by_example_has_no_interval():
  some = [
    row('a', 'x', [2.5, 1.0], metric='loss', weights=[2, 3], majority=None),
    row('b', 'x', None, [0, 1], None, metric='bleu', value=31.0),
    row('c', 'x', [1], majority=1.0),
  ]
  # 3.5 nats in 5 tokens.
  loss = paper_metric.scores(some, 'loss')['a']
  assert (loss.value, loss.majority) == (pytest.approx(0.7), None)
  assert loss.low == pytest.approx(1 / 3)
  bleu = paper_metric.scores(some, 'bleu')
  assert bleu['b'] == paper_metric.Score(31.0, None, None, None)
  assert bleu['average'] == paper_metric.Score(31.0, None, None, None)
  # One example says nothing of the others.
  assert paper_metric.scores(some)['c'] == paper_metric.Score(
    1.0, None, None, 1.0
  )
  assert paper_metric.draws(some, 'bleu') == {}
  assert 'c' not in paper_metric.draws(some)


def test_rows_of_two_runs_are_refused():
  one = row('a', 'x', [1, 0])
  other = dataclasses.replace(one, run='runs/b')
  with pytest.raises(ValueError, match="two rows.*'runs/a' and 'runs/b'"):
    paper_metric.scores([one, other])
  assert cases.INFO.run == 'runs/a'


def test_a_mean_with_a_task_of_one_example_has_no_interval():
  tasks = (*paper_metric.ROUNDS, *paper_metric.EIGHT[1:])
  sizes = {name: 1 if name == 'anli_r2' else 5 for name in tasks}
  some = [row(name, 'p', right(1, n)) for name, n in sizes.items()]
  actual = paper_metric.scores(some)
  without = {name for name, score in actual.items() if score.low is None}
  assert without == {'anli', 'average'}
  assert paper_metric.draws(some).keys() == actual.keys() - without
