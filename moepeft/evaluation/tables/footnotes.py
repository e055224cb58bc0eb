# SPDX-License-Identifier: Apache-2.0
"""Notes below a table: intervals, examples, budgets, sources."""

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

# Of fewer seeds a bootstrap cannot say how far the next one may lie.
_FEW = 5


def run_notes(
  rows: Sequence[SeedGroup],
  estimates: Sequence[Mapping[ColumnKey, Estimate]],
  keys: Sequence[ColumnKey],
) -> list[str]:
  """Remarks on a table of runs.

  Args:
    rows, estimates: the table's rows and their estimates, in one order.
    keys: of its columns.
  """
  trained = [row for row in rows if not row.first.is_base]
  notes = [
    *_intervals(estimates),
    *_few_seeds(rows),
    *_measures(keys),
    *_examples(rows),
  ]
  if keys and AVERAGE not in {key.dataset for key in keys}:
    notes += ['No average: not all of the eight sets are there.'] * any(
      key.dataset in EIGHT for key in keys
    )
  return [
    *notes,
    *_semantics(trained),
    *_budgets(trained),
    *_checkpoints(trained),
    *_settings(trained),
  ]


def _intervals(estimates) -> list[str]:
  used = {
    f.interval_method
    for by_column in estimates
    for f in by_column.values()
    if f.low is not None
  }
  where = {
    aggregate.SEEDS_AND_EXAMPLES: ' where a row has several seeds',
    aggregate.STUDENT: ' where seeds have no figures by example',
    aggregate.EXAMPLES: '',
  }
  hows = [method for method in where if method in used]
  if not hows:
    return []
  if len(hows) > 1:
    hows = [method + where[method] for method in hows]
  return [f'± is half the width of the 95 % interval: {"; else ".join(hows)}.']


def _few_seeds(rows: Sequence[SeedGroup]) -> list[str]:
  if not any(1 < len(row.entries) < _FEW for row in rows):
    return []
  return [
    f'Intervals of fewer than {_FEW} seeds are of these seeds: they do not '
    'say how far another one may lie. The picture has a dot for each.'
  ]


def bold_note(rows: Sequence[SeedGroup]) -> list[str]:
  """A remark on bold type; none where there is one row."""
  if len(rows) < 2:
    return []
  return [
    'Bold is a best figure whose difference from every other one has a 95 % '
    'interval (paired bootstrap) without 0; elsewhere there is none.'
  ]


def _measures(keys: Sequence[ColumnKey]) -> list[str]:
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
  named = {key.metric for key in keys}
  for metric in (METRICS[name] for name in METRICS if name in named):
    notes.append(_text_metric(metric))
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


def _text_metric(metric: TextMetric) -> str:
  label = metric.label[0].upper() + metric.label[1:]
  direction = '' if metric.larger_is_better else ', lower is better'
  mean = 'the mean over tasks of the median over prompts'
  if metric.scores is None:
    return (
      f'{label} is in {metric.unit}{direction}, of a prompt as a corpus: '
      f'{mean}; it has no interval.'
    )
  return f'{label} is in {metric.unit}{direction}: {mean}.'


def _examples(rows: Sequence[SeedGroup]) -> list[str]:
  """The numbers of examples, and of those that were cut."""
  notes = []
  every = [r for group in rows for e in group.entries for r in e.rows]
  for data in dict.fromkeys(row.data for row in every):
    sizes = {row.examples for row in every if row.data == data}
    tasks = {row.task for row in every if row.data == data}
    span = f'{min(sizes):,} to {max(sizes):,}'
    if len(sizes) == 1:
      span = f'{min(sizes):,}'
    name = 'the held-out rows' if data == HELD_OUT else f'{data!r}'
    notes.append(
      f'Examples a prompt in {name}: {span}, of {len(tasks)} '
      f'task{"s" * (len(tasks) > 1)}.'
    )
  return notes + _cut_notes(rows)


def _cut_notes(rows: Sequence[SeedGroup]) -> list[str]:
  """Examples cut or left out: of a prompt once if they are the same in all."""
  counts: dict[tuple, set[tuple[int, int, int]]] = {}
  single = []
  for group in rows:
    results = [row for entry in group.entries for row in entry.rows]
    single.append([(row.examples, row.cut, row.left_out) for row in results])
    for row, count in zip(results, single[-1], strict=True):
      key = (row.data, row.task, row.prompt, row.metric)
      counts.setdefault(key, set()).add(count)
  if all(len(of_prompt) == 1 for of_prompt in counts.values()):
    return _cut_note(
      '', [count for of_prompt in counts.values() for count in of_prompt]
    )
  return [
    note
    for group, results in zip(rows, single, strict=True)
    for note in _cut_note(f'{row_label(group)}: ', results)
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
  single: Sequence[Sequence[Mapping[ColumnKey, Estimate]]],
  columns: Sequence[Column],
) -> list[str]:
  """Notes on columns that only some seeds of a row have.

  Args:
    single: of each row, the figures of each seed.
  """
  notes = []
  for row, seeds in zip(rows, single, strict=True):
    lacking = [
      column.name
      for column in columns
      if 0 < sum(column.key in one_seed for one_seed in seeds) < len(seeds)
    ]
    if lacking:
      folders = ', '.join(entry.folder for entry in row.entries)
      notes.append(
        f'{row_label(row)}: not all of {folders} have '
        f'{", ".join(lacking)}, which is missing.'
      )
  return notes


def after_evaluation_notes(
  before: Sequence[RunResults], shown: Sequence[RunResults]
) -> list[str]:
  """Notes on losses of after.json, shown or left out."""
  if any(entry.loss is not None for entry in shown):
    return [
      'Held-out losses are those of after.json: the first batches of the '
      'held-out rows, without intervals.'
    ]
  lacking = [
    entry.folder
    for entry in before
    if entry.loss is not None and not entry.has_held_out
  ]
  if not lacking:
    return []
  return [
    f'No held-out rows in {", ".join(lacking)}: their after.json is of other '
    'examples than the rows of the others; python -m moepeft.evaluate '
    '--workdir=DIR makes them.'
  ]


def _semantics(rows: Sequence[SeedGroup]) -> list[str]:
  kinds = sorted({row.first.semantics for row in rows})
  bases = sorted({row.first.base for row in rows})
  if len(kinds) == len(bases) == 1:
    return [f'Base {bases[0]}, {kinds[0]} semantics.']
  return []


def _budgets(rows: Sequence[SeedGroup]) -> list[str]:
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


def _checkpoints(rows: Sequence[SeedGroup]) -> list[str]:
  """At which steps the best checkpoints are."""
  steps = [
    f'{row_label(row)} step {", ".join(f"{e.step:,}" for e in row.entries)}'
    for row in rows
    if row.first.is_best
  ]
  if not steps:
    return []
  return [f'Best checkpoints, by the validation loss: {"; ".join(steps)}.']


def _settings(rows: Sequence[SeedGroup]) -> list[str]:
  firsts = [row.first for row in rows]
  notes = []
  for key in tables_seeds.differing_settings(firsts):
    values = {}
    for row in rows:
      value = tables_seeds.format_value(row.first.settings.get(key))
      values.setdefault(value, []).append(row_label(row))
    counts = sorted(map(len, values.values()))
    texts = [
      # Of many rows most have one value: that one needs no list.
      f'else {value}'
      if len(labels) == counts[-1] > counts[-2]
      else f'{value} ({", ".join(labels)})'
      for value, labels in sorted(values.items(), key=lambda item: len(item[1]))
    ]
    notes.append(f'{key} differs: {"; ".join(texts)}.')
  return notes


def row_label(row: SeedGroup) -> str:
  """A row as the table calls it."""
  return f'`{row.first.method}`' + (
    f' {row.qualifier}' if row.qualifier else ''
  )


def baseline_note(baseline: SeedGroup) -> str:
  return (
    f'"less {baseline.first.method}" is paired: the bootstrap resamples the '
    'same examples for both, and the same seeds where both have as many.'
  )


def paper_notes(size: str, rows: Sequence[Published]) -> list[str]:
  """The source of the paper's figures, and faults of some."""
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
  """A sentence on a row of the paper that is not sound, or ''."""
  faults = [row.note] if row.note else []
  if (mean := row.recomputed()) is not None:
    faults.append(
      f'their mean is {mean:.3f}, the printed average {row.average}'
    )
  return f'{row.name}: {"; ".join(faults)}.' if faults else ''
