# SPDX-License-Identifier: Apache-2.0
"""Runs in words: changes between two evaluations."""

from moepeft.runs import before_after


def evaluation(hits, examples):
  """An evaluation as in after.json, of {task: correct answers}."""
  return {
    'rows': [
      {'task': task, 'accuracy': count / examples, 'examples': examples}
      for task, count in hits.items()
    ]
  }


def test_an_equal_figure_neither_rose_nor_fell():
  lines = before_after.describe_changes(
    {'validation_loss': 0.5, 'validation_kl': 1.0},
    {'validation_loss': 0.5, 'validation_kl': 1.00001},
  )
  assert lines == [
    'validation loss stayed at 0.5',
    'validation kl stayed at 1',
  ]


def test_the_largest_of_many_differences_is_named_only_beyond_chance():
  # 3 of 3 and then 1 of 3: with p drawn to the middle, 5/7 and 3/7, the
  # standard error is sqrt((5/7 * 2/7 + 3/7 * 4/7) / 7) = 0.25; 0.67 is 2.6 of
  # these: beyond 1.96, the bound for one task, within 3.3, that for 56.
  before = evaluation({f't{i}': 3 for i in range(56)}, 3)
  after = evaluation({f't{i}': 3 if i else 1 for i in range(56)}, 3)
  assert before_after.describe_changes(before, after) == []
  after = evaluation({f't{i}': 100 if i else 33 for i in range(56)}, 100)
  before = evaluation({f't{i}': 100 for i in range(56)}, 100)
  assert before_after.describe_changes(before, after) == [
    'tasks that moved the most: t0 -67 points'
  ]
