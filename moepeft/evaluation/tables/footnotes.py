# SPDX-License-Identifier: Apache-2.0
"""Footnotes of a table: intervals, examples, budgets, sources."""

import itertools
from collections.abc import Mapping, Sequence

from moepeft.evaluation.paper_metric import AVERAGE, EIGHT
from moepeft.evaluation.published import Published
from moepeft.evaluation.results import ACCURACY, HELD_OUT, LOSS
from moepeft.evaluation.tables import aggregate
from moepeft.evaluation.tables import seeds as tables_seeds
from moepeft.evaluation.tables.aggregate import AFTER, MEAN, ColumnKey, Estimate
from moepeft.evaluation.tables.render import Column
from moepeft.evaluation.tables.run_results import RunResults
from moepeft.evaluation.tables.seeds import SeedGroup
from moepeft.metrics import METRICS, TextMetric

# A bootstrap over fewer seeds underestimates the variance between seeds.
_MIN_SEEDS = 5


def run_notes(
  rows: Sequence[SeedGroup],
  estimates: Sequence[Mapping[ColumnKey, Estimate]],
  keys: Sequence[ColumnKey],
) -> list[str]:
  """Notes on a table of runs.

  Args:
    rows, estimates: the table's rows and their estimates, in the same order.
    keys: the keys of its columns.
  """
  trained = [row for row in rows if not row.first.is_base]
  notes = [
    *_interval_notes(estimates),
    *_few_seeds_notes(rows),
    *_metric_notes(keys),
    *_example_notes(rows),
  ]
  if keys and AVERAGE not in {key.dataset for key in keys}:
    notes += ['No average: not all of the eight sets are there.'] * any(
      key.dataset in EIGHT for key in keys
    )
  return [
    *notes,
    *_semantics_notes(trained),
    *_budget_notes(trained),
    *_checkpoint_notes(trained),
    *_setting_notes(trained),
  ]


def _interval_notes(estimates) -> list[str]:
  used = {
    estimate.interval_method
    for by_column in estimates
    for estimate in by_column.values()
    if estimate.low is not None
  }
  # Interval method -> the rows that have it, if there are several methods.
  where = {
    aggregate.SEEDS_AND_EXAMPLES: ' where a row has several seeds',
    aggregate.STUDENT: ' where seeds have no figures by example',
    aggregate.EXAMPLES: '',
  }
  methods = [method for method in where if method in used]
  if not methods:
    return []
  if len(methods) > 1:
    methods = [method + where[method] for method in methods]
  text = '; else '.join(methods)
  return [f'± is half the width of the 95 % interval: {text}.']


def _few_seeds_notes(rows: Sequence[SeedGroup]) -> list[str]:
  if not any(1 < len(row.entries) < _MIN_SEEDS for row in rows):
    return []
  return [
    f'Intervals of fewer than {_MIN_SEEDS} seeds are of these seeds: they do '
    'not say how far another one may lie. The picture has a dot for each.'
  ]


def bold_note(rows: Sequence[SeedGroup]) -> list[str]:
  """A note on bold cells; [] for a table of one row."""
  if len(rows) < 2:
    return []
  return [
    'Bold is a best figure whose difference from every other one has a 95 % '
    'interval (paired bootstrap) without 0; elsewhere there is none.'
  ]


def _metric_notes(keys: Sequence[ColumnKey]) -> list[str]:
  notes = []
  if any(key.metric == LOSS for key in keys):
    notes.append('Losses are nats a target token, lower is better.')
  sets = [key for key in keys if key.dataset in EIGHT]
  if sets:
    notes.append(
      'Accuracies are in %: the median over the prompts of a set; anli is the '
      'mean of its three rounds, the average that of the eight sets.'
    )
  if ColumnKey(HELD_OUT, ACCURACY, '') in keys:
    notes.append(
      'Held-out accuracy is in %: the mean over tasks of the median over '
      'prompts.'
    )
  if any(
    key.metric == ACCURACY and key.data not in (HELD_OUT, AFTER)
    for key in keys
    if key.dataset in ('', MEAN)
  ):
    notes.append(
      'Accuracies of other data are in %: the mean over tasks of the median '
      'over prompts.'
    )
  names = {key.metric for key in keys}
  notes += [
    _text_metric_note(METRICS[name]) for name in METRICS if name in names
  ]
  if any(key.data == HELD_OUT and ' ' in key.dataset for key in keys):
    notes.append(
      'Accuracies of groups of embedded tasks are in %: the mean over tasks, '
      'with wordings that training saw or that were held out.'
    )
  if any(key.data == AFTER for key in keys):
    notes.append(
      'Accuracies of groups of tasks are in %, from after.json, without '
      'intervals.'
    )
  return notes


def _text_metric_note(metric: TextMetric) -> str:
  label = metric.label[0].upper() + metric.label[1:]
  direction = '' if metric.larger_is_better else ', lower is better'
  mean = 'the mean over tasks of the median over prompts'
  if metric.scores is None:
    return (
      f'{label} is in {metric.unit}{direction}, of a prompt as a corpus: '
      f'{mean}; it has no interval.'
    )
  return f'{label} is in {metric.unit}{direction}: {mean}.'


def _example_notes(rows: Sequence[SeedGroup]) -> list[str]:
  """The numbers of examples, and of truncated examples."""
  notes = []
  results = [r for group in rows for e in group.entries for r in e.rows]
  for data in dict.fromkeys(result.data for result in results):
    sizes = {result.examples for result in results if result.data == data}
    tasks = {result.task for result in results if result.data == data}
    size_range = f'{min(sizes):,} to {max(sizes):,}'
    if len(sizes) == 1:
      size_range = f'{min(sizes):,}'
    name = 'the held-out rows' if data == HELD_OUT else f'{data!r}'
    notes.append(
      f'Examples a prompt in {name}: {size_range}, of {len(tasks)} '
      f'task{"s" * (len(tasks) > 1)}.'
    )
  return notes + _cut_notes(rows)


def _cut_notes(rows: Sequence[SeedGroup]) -> list[str]:
  """One note on truncated examples, or one per row if their counts differ."""
  prompt_counts: dict[tuple, set[tuple[int, int, int]]] = {}
  row_counts = []
  for group in rows:
    results = [result for entry in group.entries for result in entry.rows]
    row_counts.append([(r.examples, r.cut, r.left_out) for r in results])
    for result, counts in zip(results, row_counts[-1], strict=True):
      key = (result.data, result.task, result.prompt, result.metric)
      prompt_counts.setdefault(key, set()).add(counts)
  if all(len(counts) == 1 for counts in prompt_counts.values()):
    return _cut_note('', [*itertools.chain(*prompt_counts.values())])
  return [
    note
    for group, counts in zip(rows, row_counts, strict=True)
    for note in _cut_note(f'{row_label(group)}: ', counts)
  ]


def _cut_note(name: str, counts: Sequence[tuple[int, int, int]]) -> list[str]:
  if not counts:
    return []
  total, cut, left_out = map(sum, zip(*counts, strict=True))
  if not cut and not left_out:
    return []
  return [
    f'{name}{cut:,} of {total:,} prompted examples were cut to the lengths of '
    f'the run; {left_out:,} could not be ranked and are left out.'
  ]


def missing_notes(
  rows: Sequence[SeedGroup],
  by_seed: Sequence[Sequence[Mapping[ColumnKey, Estimate]]],
  columns: Sequence[Column],
) -> list[str]:
  """Notes on columns that only some seeds of a row have.

  Args:
    by_seed: each row's estimates of each seed.
  """
  notes = []
  for row, seeds in zip(rows, by_seed, strict=True):
    missing = [
      column.name
      for column in columns
      if 0 < sum(column.key in estimates for estimates in seeds) < len(seeds)
    ]
    if missing:
      folders = ', '.join(entry.folder for entry in row.entries)
      notes.append(
        f'{row_label(row)}: not all of {folders} have '
        f'{", ".join(missing)}, which is missing.'
      )
  return notes


def after_evaluation_notes(
  all_entries: Sequence[RunResults], entries: Sequence[RunResults]
) -> list[str]:
  """Notes on losses of after.json that are in the table or were left out.

  Args:
    all_entries, entries: with and without after.json's losses; see
      `aggregate.without_after_evaluations`.
  """
  if any(entry.loss is not None for entry in entries):
    return [
      'Held-out losses are those of after.json: the first batches of the '
      'held-out rows, without intervals.'
    ]
  left_out = [
    entry.folder
    for entry in all_entries
    if entry.loss is not None and not entry.has_held_out
  ]
  if not left_out:
    return []
  return [
    f'No held-out rows in {", ".join(left_out)}: their after.json is of other '
    'examples than the rows of the others; python -m moepeft.evaluate '
    '--workdir=DIR makes them.'
  ]


def _semantics_notes(rows: Sequence[SeedGroup]) -> list[str]:
  semantics = {row.first.semantics for row in rows}
  bases = {row.first.base for row in rows}
  if len(semantics) == len(bases) == 1:
    return [f'Base {bases.pop()}, {semantics.pop()} semantics.']
  return []


def _budget_notes(rows: Sequence[SeedGroup]) -> list[str]:
  budgets = {}
  for row in rows:
    budgets.setdefault(row.first.budget, []).append(row_label(row))
  if len(budgets) < 2:
    return [
      f'Budget: {steps:,} steps of {batch:,} rows.' for steps, batch in budgets
    ]
  text = '; '.join(
    f'{steps:,} steps of {batch:,} rows: {", ".join(labels)}'
    for (steps, batch), labels in budgets.items()
  )
  return [f'**Budgets differ**: {text}.']


def _checkpoint_notes(rows: Sequence[SeedGroup]) -> list[str]:
  """The steps of the best checkpoints."""
  steps = [
    f'{row_label(row)} step {", ".join(f"{e.step:,}" for e in row.entries)}'
    for row in rows
    if row.first.is_best
  ]
  if not steps:
    return []
  return [f'Best checkpoints, by the validation loss: {"; ".join(steps)}.']


def _setting_notes(rows: Sequence[SeedGroup]) -> list[str]:
  firsts = [row.first for row in rows]
  notes = []
  for key in tables_seeds.differing_settings(firsts):
    values = {}
    for row in rows:
      value = tables_seeds.format_value(row.first.settings.get(key))
      values.setdefault(value, []).append(row_label(row))
    counts = sorted(map(len, values.values()))
    texts = [
      # The most frequent value needs no list of its rows.
      f'else {value}'
      if len(labels) == counts[-1] > counts[-2]
      else f'{value} ({", ".join(labels)})'
      for value, labels in sorted(values.items(), key=lambda item: len(item[1]))
    ]
    notes.append(f'{key} differs: {"; ".join(texts)}.')
  return notes


def row_label(row: SeedGroup) -> str:
  """The row's label in the table."""
  return f'`{row.first.method}`' + (
    f' {row.qualifier}' if row.qualifier else ''
  )


def baseline_note(baseline: SeedGroup) -> str:
  return (
    f'"less {baseline.first.method}" is paired: the bootstrap resamples the '
    'same examples for both, and the same seeds where both have as many.'
  )


def paper_notes(size: str, rows: Sequence[Published]) -> list[str]:
  """The source of the paper's numbers, and known errors of its rows."""
  notes = [
    f'Paper: Zadouri et al., arXiv:2309.05444, {size}, full validation sets; '
    'from secondary sources, to be checked against the PDF before they are '
    'quoted. Its % are as printed: of a rounded size of the base, and not '
    'everywhere what the released code trains.'
  ]
  return notes + [
    f"The paper's {published_row_note(row)}"
    for row in rows
    if published_row_note(row)
  ]


def published_row_note(row: Published) -> str:
  """The known errors of a row of the paper, or ''."""
  errors = [row.note] if row.note else []
  if (mean := row.recomputed()) is not None:
    errors.append(
      f'their mean is {mean:.3f}, the printed average {row.average}'
    )
  return f'{row.name}: {"; ".join(errors)}.' if errors else ''
