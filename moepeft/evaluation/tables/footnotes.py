# SPDX-License-Identifier: Apache-2.0
"""What must be said below a table: intervals, examples, budgets, sources."""

from collections.abc import Mapping, Sequence

from moepeft.evaluation.paper_metric import AVERAGE, EIGHT
from moepeft.evaluation.published import Published
from moepeft.evaluation.results import ACCURACY, HELD_OUT, LOSS
from moepeft.evaluation.tables import aggregate
from moepeft.evaluation.tables import seeds as tables_seeds
from moepeft.evaluation.tables.aggregate import AFTER, MEAN, Figure, Key
from moepeft.evaluation.tables.render import Column
from moepeft.evaluation.tables.run_results import Entry
from moepeft.evaluation.tables.seeds import Group
from moepeft.metrics import METRICS, TextMetric

# Of fewer seeds a bootstrap cannot say how far the next one may lie.
_FEW = 5


def of_runs(
  rows: Sequence[Group],
  found: Sequence[Mapping[Key, Figure]],
  keys: Sequence[Key],
) -> list[str]:
  """Remarks on a table of runs.

  Args:
    rows, found: the table's rows and their figures, in one order.
    keys: of its columns.
  """
  trained = [row for row in rows if not row.first.is_base]
  notes = [
    *_intervals(found),
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


def _intervals(found) -> list[str]:
  used = {f.how for own in found for f in own.values() if f.low is not None}
  where = {
    aggregate.SEEDS_AND_EXAMPLES: ' where a row has several seeds',
    aggregate.STUDENT: ' where seeds have no figures by example',
    aggregate.EXAMPLES: '',
  }
  hows = [how for how in where if how in used]
  if not hows:
    return []
  if len(hows) > 1:
    hows = [how + where[how] for how in hows]
  return [f'± is half the width of the 95 % interval: {"; else ".join(hows)}.']


def _few_seeds(rows: Sequence[Group]) -> list[str]:
  if not any(1 < len(row.entries) < _FEW for row in rows):
    return []
  return [
    f'Intervals of fewer than {_FEW} seeds are of these seeds: they do not '
    'say how far another one may lie. The picture has a dot for each.'
  ]


def of_best(rows: Sequence[Group]) -> list[str]:
  """A remark on bold type; none where there is one row."""
  if len(rows) < 2:
    return []
  return [
    'Bold is a best figure whose difference from every other one has a 95 % '
    'interval (paired bootstrap) without 0; elsewhere there is none.'
  ]


def _measures(keys: Sequence[Key]) -> list[str]:
  said = []
  if any(key.metric == LOSS for key in keys):
    said.append('Losses are nats a target token, lower is better.')
  sets = [key for key in keys if key.dataset in EIGHT]
  if sets:
    said.append(
      'Accuracies are in %: the median over the prompts of a set; anli is the '
      'mean of its three rounds, the average that of the eight sets.'
    )
  if Key(HELD_OUT, ACCURACY, '') in keys:
    said.append(
      'Held-out accuracy is in %: the mean over tasks of the median over '
      'prompts.'
    )
  if any(
    key.metric == ACCURACY and key.data not in (HELD_OUT, AFTER)
    for key in keys
    if key.dataset in ('', MEAN)
  ):
    said.append(
      'Accuracies of other data are in %: the mean over tasks of the median '
      'over prompts.'
    )
  named = {key.metric for key in keys}
  for metric in (METRICS[name] for name in METRICS if name in named):
    said.append(_text_metric(metric))
  if any(key.data == HELD_OUT and ' ' in key.dataset for key in keys):
    said.append(
      'Accuracies of groups of embedded tasks are in %: the mean over tasks, '
      'with wordings that training saw or that were held out.'
    )
  if any(key.data == AFTER for key in keys):
    said.append(
      'Accuracies of groups of tasks are in %, from after.json, without '
      'intervals.'
    )
  return said


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


def _examples(rows: Sequence[Group]) -> list[str]:
  """How many examples stand behind the figures, and what was cut."""
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
  return notes + _lost(rows)


def _lost(rows: Sequence[Group]) -> list[str]:
  """What was cut or left out: of a prompt once where it is the same in all."""
  counts: dict[tuple, set[tuple[int, int, int]]] = {}
  single = []
  for group in rows:
    own = [row for entry in group.entries for row in entry.rows]
    single.append([(row.examples, row.cut, row.left_out) for row in own])
    for row, count in zip(own, single[-1], strict=True):
      what = (row.data, row.task, row.prompt, row.metric)
      counts.setdefault(what, set()).add(count)
  if all(len(found) == 1 for found in counts.values()):
    return _cut('', [count for found in counts.values() for count in found])
  return [
    note
    for group, own in zip(rows, single, strict=True)
    for note in _cut(f'{label(group)}: ', own)
  ]


def _cut(name: str, counts: Sequence[tuple[int, int, int]]) -> list[str]:
  if not counts:
    return []
  total, cut, left = map(sum, zip(*counts, strict=True))
  if not cut and not left:
    return []
  return [
    f'{name}{cut:,} of {total:,} prompted examples were cut to the lengths of '
    f'the run; {left:,} could not be ranked and are left out.'
  ]


def of_missing(
  rows: Sequence[Group],
  single: Sequence[Sequence[Mapping[Key, Figure]]],
  columns: Sequence[Column],
) -> list[str]:
  """What some seeds of a row have and others lack, so that it is missing.

  Args:
    single: of each row, the figures of each seed.
  """
  notes = []
  for row, seeds in zip(rows, single, strict=True):
    lacking = [
      column.name
      for column in columns
      if 0 < sum(column.key in own for own in seeds) < len(seeds)
    ]
    if lacking:
      folders = ', '.join(entry.folder for entry in row.entries)
      notes.append(
        f'{label(row)}: not all of {folders} have {", ".join(lacking)}, which '
        'is missing.'
      )
  return notes


def of_after(given: Sequence[Entry], kept: Sequence[Entry]) -> list[str]:
  """Where losses of after.json stand, and where they were left out."""
  if any(entry.loss is not None for entry in kept):
    return [
      'Held-out losses are those of after.json: the first batches of the '
      'held-out rows, without intervals.'
    ]
  lacking = [
    entry.folder
    for entry in given
    if entry.loss is not None and not entry.has_held_out
  ]
  if not lacking:
    return []
  return [
    f'No held-out rows in {", ".join(lacking)}: their after.json is of other '
    'examples than the rows of the others; python -m moepeft.evaluate '
    '--workdir=DIR makes them.'
  ]


def _semantics(rows: Sequence[Group]) -> list[str]:
  kinds = sorted({row.first.semantics for row in rows})
  bases = sorted({row.first.base for row in rows})
  if len(kinds) == len(bases) == 1:
    return [f'Base {bases[0]}, {kinds[0]} semantics.']
  return []


def _budgets(rows: Sequence[Group]) -> list[str]:
  budgets = {}
  for row in rows:
    budgets.setdefault(row.first.budget, []).append(label(row))
  if len(budgets) < 2:
    return [
      f'Budget: {steps:,} steps of {batch:,} rows.' for steps, batch in budgets
    ]
  said = '; '.join(
    f'{steps:,} steps of {batch:,} rows: {", ".join(labels)}'
    for (steps, batch), labels in budgets.items()
  )
  return [f'**Budgets differ**: {said}.']


def _checkpoints(rows: Sequence[Group]) -> list[str]:
  """At which steps the best checkpoints are."""
  said = [
    f'{label(row)} step {", ".join(f"{e.step:,}" for e in row.entries)}'
    for row in rows
    if row.first.is_best
  ]
  if not said:
    return []
  return [f'Best checkpoints, by the validation loss: {"; ".join(said)}.']


def _settings(rows: Sequence[Group]) -> list[str]:
  firsts = [row.first for row in rows]
  notes = []
  for key in tables_seeds.differing(firsts):
    values = {}
    for row in rows:
      value = tables_seeds.shown(row.first.settings.get(key))
      values.setdefault(value, []).append(label(row))
    counts = sorted(map(len, values.values()))
    said = [
      # Of many rows most have one value: that one needs no list.
      f'else {value}'
      if len(own) == counts[-1] > counts[-2]
      else f'{value} ({", ".join(own)})'
      for value, own in sorted(values.items(), key=lambda item: len(item[1]))
    ]
    notes.append(f'{key} differs: {"; ".join(said)}.')
  return notes


def label(row: Group) -> str:
  """A row as the table calls it."""
  return f'`{row.first.method}`' + (f' {row.aside}' if row.aside else '')


def of_baseline(baseline: Group) -> str:
  return (
    f'"less {baseline.first.method}" is paired: the bootstrap resamples the '
    'same examples for both, and the same seeds where both have as many.'
  )


def of_paper(size: str, rows: Sequence[Published]) -> list[str]:
  """Where the paper's figures are from, and what is wrong with some."""
  notes = [
    f'Paper: Zadouri et al., arXiv:2309.05444, {size}, full validation sets; '
    'from secondary sources, to be checked against the PDF before they are '
    'quoted. Its % are as printed: of a rounded size of the base, and not '
    'everywhere what the released code trains.'
  ]
  return notes + [f"The paper's {of_row(row)}" for row in rows if of_row(row)]


def of_row(row: Published) -> str:
  """A sentence on a row of the paper that is not sound, or ''."""
  said = [row.note] if row.note else []
  if (mean := row.recomputed()) is not None:
    said.append(f'their mean is {mean:.3f}, the printed average {row.average}')
  return f'{row.name}: {"; ".join(said)}.' if said else ''
