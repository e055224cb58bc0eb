# SPDX-License-Identifier: Apache-2.0
"""Figures of runs, of several seeds and of differences."""

import dataclasses

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.evaluation import bootstrap
from moepeft.evaluation.tables import aggregate, comparable, run_results
from moepeft.evaluation.tables import seeds as tables_seeds
from moepeft.evaluation.tables.aggregate import ColumnKey, Estimate

from .. import runs

DEFAULTS = config_lib.default().to_dict()
LOSS = ColumnKey('held_out', 'loss', '')
ACCURACY = ColumnKey('held_out', 'accuracy', '')


def entry(folder, rows=(), changes=None, **more):
  (actual,) = run_results.read(
    runs.make(folder, rows, changes, **more), DEFAULTS
  )
  return actual


def held_out(folder, rows, **more):
  return entry(folder, rows, {'data': 'held_out'}, **more)


def test_loss_is_over_the_tokens_of_all_tasks(tmp_path):
  # 2 + 4 nats of 1 + 3 tokens, and 6 of 2: 12 / 6, not a mean of means.
  rows = [
    ('a', 'p', 'loss', [2.0, 4.0], [1, 3]),
    ('b', 'p', 'loss', [6.0], [2]),
  ]
  figure = aggregate.estimates_of(held_out(tmp_path, rows))[LOSS]
  assert figure.value == pytest.approx(2.0)
  # Examples have 2, 4/3 and 3 nats a token: no resample leaves that range.
  assert 4 / 3 <= figure.low < 2 < figure.high <= 3


def test_held_out_accuracy_is_the_mean_over_tasks_in_per_cent(tmp_path):
  rows = [
    ('a', 'p', 'accuracy', runs.right(1, 4)),
    ('a', 'q', 'accuracy', runs.right(3, 4)),
    ('a', 'r', 'accuracy', runs.right(4, 4)),
    ('b', 'p', 'accuracy', runs.right(1, 2)),
  ]
  actual = aggregate.estimates_of(held_out(tmp_path, rows))
  # The median of 25, 75 and 100 is 75; with 50 the mean is 62.5.
  assert actual[ACCURACY].value == pytest.approx(62.5)
  assert actual[ACCURACY].majority == pytest.approx(50)
  assert set(actual) == {ACCURACY}


def test_an_average_needs_all_eight_sets(tmp_path):
  average = ColumnKey('eval', 'accuracy', 'average')
  whole = aggregate.estimates_of(entry(tmp_path / 'a', runs.grid(3, 5)))
  assert whole[average].value == pytest.approx(60)
  assert len(whole) == 9
  lacking = [t for t in runs.TASKS if t != 'copa']
  actual = aggregate.estimates_of(
    entry(tmp_path / 'b', runs.grid(3, 5, lacking))
  )
  assert average not in actual and len(actual) == 7


def test_other_tasks_do_not_enter_the_papers_average(tmp_path):
  rows = [*runs.grid(3, 5), ('mine', 'p', 'accuracy', runs.right(0, 5))]
  actual = aggregate.estimates_of(entry(tmp_path, rows))
  assert actual[
    ColumnKey('eval', 'accuracy', 'average')
  ].value == pytest.approx(60)
  assert actual[ColumnKey('eval', 'accuracy', 'mean')].value == 0


def test_without_examples_five_seeds_have_students_interval_and_fewer_none():
  # Of 2, 3, ..., 6: deviation sqrt(5/2), t with four degrees 2.7764, / sqrt(5).
  seeds = [{LOSS: Estimate(x, x - 9, x + 9)} for x in (2.0, 3.0, 4.0, 5.0, 6.0)]
  figure = aggregate.mean_over_seeds(seeds)[LOSS]
  half = 2.776445 * 2.5**0.5 / 5**0.5
  assert figure.value == pytest.approx(4)
  assert (figure.low, figure.high) == pytest.approx((4 - half, 4 + half))
  assert figure.seeds == (2, 3, 4, 5, 6)
  few = aggregate.mean_over_seeds(seeds[:4])[LOSS]
  assert (few.value, few.low, few.high) == (3.5, None, None)
  # One seed keeps the interval over examples.
  assert aggregate.mean_over_seeds(seeds[:1]) == seeds[0]


def test_students_interval_ends_where_the_measure_does():
  accuracies = (100.0, 100.0, 100.0, 100.0, 80.0)
  seeds = [{ACCURACY: Estimate(x), LOSS: Estimate(x / 100)} for x in accuracies]
  actual = aggregate.mean_over_seeds(seeds)
  # 96 +- 2.776 * 8.94 / sqrt(5) = 96 +- 11.1.
  assert actual[ACCURACY].high == 100 and 84 < actual[ACCURACY].low < 85
  assert actual[LOSS].high == pytest.approx(1.07, abs=0.01)


def test_two_seeds_are_resampled_with_their_examples(tmp_path):
  # 20 and 25 of 50 examples are right, the same 20 in both.
  n, rights = 50, (20, 25)
  made = [
    held_out(tmp_path / str(s), [('t', 'p', 'accuracy', runs.right(of, n))])
    for s, of in enumerate(rights)
  ]
  made = [dataclasses.replace(e, seed=s) for s, e in enumerate(made)]
  single = [aggregate.estimates_of(e) for e in made]
  draws = aggregate.mean_draws(made)
  figure = aggregate.mean_over_seeds(single, draws)[ACCURACY]
  assert figure.value == pytest.approx(45)
  assert figure.seeds == (40, 50)
  # By hand: draw i of both seeds counts the same examples; seeds are drawn too.
  one, two = (aggregate.draws_of(e)[ACCURACY] for e in made)
  assert (two >= one).all()
  first = bootstrap.seed_weights(2)[:, 0]
  np.testing.assert_allclose(draws[ACCURACY], first * one + (1 - first) * two)
  assert {*first} == {0, 0.5, 1}
  # sqrt(0.45 * 0.55 / 50) = 7.0 % of the examples and sqrt(12.5) = 3.5 % of
  # the seeds: 1.96 * 7.9 = 15.4. Student's would be 12.7 * 5 = 63.5.
  assert (figure.high - figure.low) / 2 == pytest.approx(15.4, abs=1.5)
  assert 0 <= figure.low < 40 and 50 < figure.high <= 100
  # The order of the command line is no matter.
  again = aggregate.mean_draws(made[::-1])
  np.testing.assert_array_equal(again[ACCURACY], draws[ACCURACY])


def test_the_majority_over_seeds_is_their_mean():
  seeds = [{ACCURACY: Estimate(50.0, majority=x)} for x in (30.0, 50.0)]
  assert aggregate.mean_over_seeds(seeds)[ACCURACY].majority == 40


def test_what_one_seed_lacks_is_no_mean_of_the_others():
  seeds = [
    {LOSS: Estimate(1.0), ACCURACY: Estimate(50.0)},
    {LOSS: Estimate(3.0)},
  ]
  assert set(aggregate.mean_over_seeds(seeds)) == {LOSS}


def difference(one, other):
  pairs = [
    (
      aggregate.mean_over_seeds([aggregate.estimates_of(e)]),
      aggregate.mean_draws([e]),
    )
    for e in (one, other)
  ]
  return aggregate.differences(*pairs)


def test_differences_are_paired_by_example(tmp_path):
  n = 53
  rng = np.random.default_rng(0)
  each = rng.integers(0, 2, n).tolist()
  weights = rng.integers(1, 7, n).tolist()
  nll = (rng.random(n) * 5).tolist()
  # One nat a token more for every example.
  more = [x + w for x, w in zip(nll, weights, strict=True)]
  one = held_out(
    tmp_path / 'a',
    [('t', 'p', 'accuracy', each), ('t', 'p', 'loss', more, weights)],
  )
  other = held_out(
    tmp_path / 'b',
    [('t', 'p', 'accuracy', each), ('t', 'p', 'loss', nll, weights)],
  )
  actual = difference(one, other)
  # The same answers: no resample differs. Loss differs by one in each.
  assert actual[ACCURACY] == Estimate(0.0, 0.0, 0.0)
  figure = actual[LOSS]
  values = (figure.value, figure.low, figure.high)
  # Sums of 53 float64 numbers.
  np.testing.assert_allclose(values, 1, rtol=1e-12)
  # Each loss by itself is far less certain.
  own = aggregate.estimates_of(one)[LOSS]
  assert own.high - own.low > 0.2


def test_other_examples_prompts_or_tasks_are_not_compared(tmp_path):
  def check(*rows):
    made = [held_out(tmp_path / str(i), own) for i, own in enumerate(rows)]
    comparable.check_comparable(made)

  one = ('a', 'p', 'accuracy', runs.right(1, 3))
  check([one], [one])
  with pytest.raises(ValueError, match=r"examples of 'a', prompt 'p' \(3 and"):
    check([one], [('a', 'p', 'accuracy', runs.right(1, 5))])
  with pytest.raises(ValueError, match=r"other prompts of 'a' \(1 and 2\)"):
    check([one], [one, ('a', 'q', 'accuracy', runs.right(1, 3))])
  with pytest.raises(ValueError, match='other tasks for accuracy of held_out'):
    check([one], [one, ('b', 'p', 'accuracy', runs.right(1, 3))])


def test_a_set_that_only_one_run_has_is_no_mistake(tmp_path):
  made = [
    entry(tmp_path / 'a', runs.grid(3, 5)),
    entry(tmp_path / 'b', runs.grid(3, 5, ['cb', 'rte'])),
  ]
  comparable.check_comparable(made)


def test_other_data_or_lengths_of_one_name_are_not_compared(tmp_path):
  def made(name, **changes):
    rows = [('a', 'p', 'accuracy', runs.right(1, 3))]
    return entry(tmp_path / name, rows, changes)

  lengths = {'inputs_length': 64, 'targets_length': 8}
  one = made('one', data_sha='0123456789ab', **lengths)
  comparable.check_comparable(
    [one, made('same', data_sha='0123456789ab', **lengths)]
  )
  # Rows from before either was written may be of anything.
  comparable.check_comparable([one, made('old')])
  other = made('other', data_sha='ba9876543210', **lengths)
  with pytest.raises(ValueError, match="other rows of the name 'eval' .hashes"):
    comparable.check_comparable([one, other])
  # Of another name it may be other data.
  comparable.check_comparable(
    [one, made('named', data='mine', data_sha='ba9876543210')]
  )
  lengths['targets_length'] = 16
  longer = made('longer', data_sha='0123456789ab', **lengths)
  with pytest.raises(ValueError, match=r'\(64, 8\) and \(64, 16\)'):
    comparable.check_comparable([one, longer])


def test_embedded_tasks_differ_by_seed(tmp_path):
  config = {'data.source': 'tasks'}
  rows = [('a', 'p', 'accuracy', runs.right(1, 3))]
  made = [
    held_out(tmp_path / 'a', rows, config=config),
    held_out(
      tmp_path / 'b', [('a', 'p', 'accuracy', [1, 0, 1, 0, 1])], config=config
    ),
  ]
  with pytest.raises(ValueError, match='examples of'):
    comparable.check_comparable(made)
  comparable.check_comparable([made[0], dataclasses.replace(made[1], seed=1)])


def test_losses_of_after_json_need_the_same_held_out_rows(tmp_path):
  after = {'step': 7, 'validation_loss': 2.0, 'means': {}}
  one = entry(tmp_path / 'a', after=after)
  other = entry(
    tmp_path / 'b', after=after, config={'data.validation_fraction': 0.25}
  )
  comparable.check_comparable([one, one])
  with pytest.raises(
    ValueError, match=r'config.data.validation_fraction is 0.05 and 0.2'
  ):
    comparable.check_comparable([one, other])


def test_after_json_stands_back_where_any_run_has_rows(tmp_path):
  after = {'step': 7, 'validation_loss': 2.0, 'means': {'A seen': 0.5}}
  one = entry(tmp_path / 'a', after=after)
  rows = [('t', 'p', 'loss', [1.0, 2.0], [1, 1])]
  other = held_out(tmp_path / 'b', rows, after=after)
  assert aggregate.estimates_of(one)[LOSS] == Estimate(2.0)
  remaining = aggregate.without_after_evaluations([one, other])
  assert [LOSS in aggregate.estimates_of(e) for e in remaining] == [False, True]


def test_seeds_are_one_row_and_settings_are_told_apart(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  made = [
    entry(tmp_path / 'a', rows),
    entry(tmp_path / 'b', rows, {'seed': 1}),
    entry(tmp_path / 'c', rows, config={'optimizer.learning_rate': 0.01}),
    entry(tmp_path / 'd', rows, {'method': 'ia3'}),
  ]
  actual = tables_seeds.group_by_seed(made)
  assert [(len(g.entries), g.qualifier) for g in actual] == [
    (2, 'optimizer.learning_rate=0.001'),
    (1, 'optimizer.learning_rate=0.01'),
    (1, ''),
  ]
  # Where it lies and how it is logged is no other method.
  same = entry(tmp_path / 'e', rows, {'seed': 2}, config={'log.every_steps': 3})
  assert len(tables_seeds.group_by_seed([*made[:2], same])[0].entries) == 3


def test_semantics_bases_and_steps_stay_apart_and_are_said(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  made = [
    entry(tmp_path / 'a', rows),
    entry(tmp_path / 'b', rows, {'semantics': 'paper'}),
    entry(tmp_path / 'c', rows, {'base': 'other'}),
    entry(tmp_path / 'd', rows, {'step': 11}, config={'steps': 7}),
  ]
  assert [g.qualifier for g in tables_seeds.group_by_seed(made)] == [
    'on t5_tiny, official, step 7',
    'on t5_tiny, paper',
    'on other, official',
    'on t5_tiny, official, step 11',
  ]


def test_best_checkpoints_of_other_steps_are_seeds_of_one_row(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  made = [
    entry(
      tmp_path / str(seed),
      rows,
      {'seed': seed, 'step': step, 'checkpoint': checkpoint},
      config={'steps': 13},
    )
    for seed, step, checkpoint in (
      (0, 7, 'best'),
      (1, 11, 'best'),
      (2, 7, 'latest'),
      # From before rows said it.
      (3, 7, None),
    )
  ]
  actual = tables_seeds.group_by_seed(made)
  assert [([e.seed for e in g.entries], g.qualifier) for g in actual] == [
    ([0, 1], 'best checkpoint'),
    ([2, 3], 'step 7'),
  ]
  # The best of all thirteen steps.
  assert actual[0].first.budget == (13, 5)


def test_two_best_checkpoints_of_one_run_are_no_two_seeds(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  best = {'checkpoint': 'best'}
  runs.make(tmp_path, rows, best | {'step': 7})
  runs.add(tmp_path, runs.info(tmp_path, data='x', step=11, **best), rows)
  with pytest.raises(ValueError, match='best checkpoint at the steps 7 and 11'):
    tables_seeds.group_by_seed(run_results.read(str(tmp_path), DEFAULTS))


def base(folder, rows, changes=None, **more):
  changes = {'method': 'none', 'parameters': 0, 'step': 0} | (changes or {})
  return entry(folder, rows, changes, **more)


def test_a_base_has_the_rows_of_all_its_evaluations(tmp_path):
  cb, rte = runs.grid(1, 3, ['cb', 'rte'])
  one, other = base(tmp_path / 'a', [cb]), base(tmp_path / 'b', [cb, rte])
  (actual,) = tables_seeds.group_by_seed([one, other])
  assert [row.task for row in actual.first.rows] == ['cb', 'rte']
  wrong = base(tmp_path / 'c', runs.grid(2, 3, ['cb']))
  with pytest.raises(ValueError, match="contradict each other in .* of 'cb'"):
    tables_seeds.group_by_seed([one, wrong])


def test_bases_that_depend_on_the_seed_stay_apart(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  asides = ['the base, seed 0', 'the base, seed 1']
  for name, changes, config in (
    ('random', {'base': 'random'}, {}),
    ('tasks', {'data': 'held_out'}, {'data.source': 'tasks'}),
  ):
    made = [
      base(tmp_path / f'{name}{i}', rows, changes | {'seed': i}, config=config)
      for i in (0, 1)
    ]
    assert [g.qualifier for g in tables_seeds.group_by_seed(made)] == asides


def test_two_bases_of_one_name_are_told_apart_by_their_size(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  made = [
    entry(tmp_path / 'a', rows),
    entry(tmp_path / 'b', rows, {'seed': 1, 'base_parameters': 2_000}),
  ]
  assert [g.qualifier for g in tables_seeds.group_by_seed(made)] == [
    'on t5_tiny, 1,000,000 parameters',
    'on t5_tiny, 2,000 parameters',
  ]


def test_one_seed_is_not_two(tmp_path):
  rows = [('t', 'p', 'accuracy', runs.right(1, 3))]
  one, other = entry(tmp_path / 'a', rows), entry(tmp_path / 'b', rows)
  with pytest.raises(ValueError, match='given twice'):
    tables_seeds.group_by_seed([one, one])
  with pytest.raises(ValueError, match='they are no two seeds'):
    tables_seeds.group_by_seed([one, other])


def test_embedded_tasks_are_told_apart_by_group_and_wording(tmp_path):
  first, second, other = 'kind', 'topic', 'counting'
  rows = [
    (first, 'seen', 'accuracy', runs.right(1, 2)),
    (first, 'held_out', 'accuracy', runs.right(0, 2)),
    (second, 'seen', 'accuracy', runs.right(2, 2)),
    (other, 'seen', 'accuracy', runs.right(0, 2)),
  ]
  actual = aggregate.estimates_of(
    held_out(tmp_path, rows, config={'data.source': 'tasks'})
  )
  # A: the mean of 50 and 100; the wordings are no prompts of one median.
  assert {key.dataset: f.value for key, f in actual.items()} == {
    'A seen': 75,
    'A held_out': 0,
    'C seen': 0,
  }


def test_the_papers_sets_beside_held_out_tasks_stay_apart(tmp_path):
  rows = [
    ('mine', 'p', 'accuracy', runs.right(1, 2)),
    ('cb', 'p', 'accuracy', runs.right(2, 2)),
  ]
  actual = aggregate.estimates_of(held_out(tmp_path, rows))
  assert actual[ACCURACY].value == 50
  assert actual[ColumnKey('held_out', 'accuracy', 'cb')].value == 100
