# SPDX-License-Identifier: Apache-2.0
"""Summaries of results: accuracies by task, as JSON and for a terminal."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moepeft.core import files, terminal
from moepeft.evaluation import paper_metric
from moepeft.evaluation.eval_sets import PromptExamples
from moepeft.evaluation.results import ACCURACY, LOSS, Measurement, Result
from moepeft.evaluation.tables import terminal as results_table
from moepeft.metrics import METRICS

_COLUMNS = ('group', 'task', 'templates', 'n', 'chance', 'before', 'after')


def accuracy_rows(
  prompts: Sequence[PromptExamples], measured: Sequence[Measurement]
) -> list[dict[str, Any]]:
  """Accuracies of tasks over the examples of all their prompts.

  Returns:
    A dict of group, task, templates, examples, cut, accuracy and chance for
    each task and split of templates.
  """
  keys = {(p.task, p.name): (p.group, p.task, p.templates) for p in prompts}
  by_task = collections.defaultdict(list)
  for m in measured:
    if m.metric == ACCURACY:
      by_task[keys[m.task, m.prompt]].append(m)
  return [
    {
      'group': group,
      'task': task,
      'templates': templates,
      'examples': sum(m.examples for m in task_measured),
      'cut': sum(m.cut for m in task_measured),
      'accuracy': _mean(task_measured, 'value'),
      'chance': _mean(task_measured, 'chance'),
    }
    for (group, task, templates), task_measured in by_task.items()
  ]


def _mean(measured: Sequence[Measurement], field: str) -> float:
  """The mean of a field over prompts, weighted by their examples."""
  values = [getattr(m, field) for m in measured]
  if len(values) == 1:
    return values[0]
  return float(np.average(values, weights=[m.examples for m in measured]))


def mean_accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """'group templates' -> the mean accuracy of its tasks."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[f'{row["group"]} {row["templates"]}'.strip()].append(row['accuracy'])
  return {key: float(np.mean(values)) for key, values in groups.items()}


def before_after_table(before: Sequence[dict], after: Sequence[dict]) -> str:
  """Accuracies before and after training, with means of the groups, as text.

  Columns without any entry are left out.

  Args:
    before, after: from `accuracy_rows`; `before` may be empty.
  """
  keys = [(r['group'], r['task'], r['templates']) for r in after]
  rows_before = {(r['group'], r['task'], r['templates']): r for r in before}
  lines = [_COLUMNS]
  for key, row in zip(keys, after, strict=True):
    lines.append(
      (
        *key,
        str(row['examples']),
        f'{row["chance"]:.3f}',
        f'{rows_before[key]["accuracy"]:.3f}' if key in rows_before else '-',
        f'{row["accuracy"]:.3f}',
      )
    )
  means_before = mean_accuracies(
    [rows_before[key] for key in keys if key in rows_before]
  )
  for key, value in mean_accuracies(after).items():
    value_before = f'{means_before[key]:.3f}' if key in means_before else '-'
    group, _, templates = key.partition(' ')
    lines.append(
      (group, 'MEAN', templates, '', '', value_before, f'{value:.3f}')
    )
  unused = set()
  if not any(templates for _, _, templates in keys):
    unused.add('templates')
  if not before:
    unused.add('before')
  return results_table.aligned(
    [
      [
        cell
        for cell, name in zip(line, _COLUMNS, strict=True)
        if name not in unused
      ]
      for line in lines
    ]
  )


def warnings(
  total: int, cut: int, num_unrankable: int, kind: str = 'ranked examples'
) -> list[str]:
  """Lines about examples that were truncated or could not be ranked."""
  lines = []
  if cut:
    lines.append(
      f'{cut} of {total} {kind} are cut to config.data.inputs_length'
      ' or config.data.targets_length'
    )
  if num_unrankable:
    lines.append(
      f'{num_unrankable} examples are left out: two of their choices are the '
      'same to the tokenizer, or after config.data.targets_length'
    )
  return lines


def summarize(
  method: str,
  step: int,
  prompts: Sequence[PromptExamples],
  results: Sequence[Result],
) -> dict[str, Any]:
  """Makes the summary of an evaluation: scores by task, group and data set.

  Args:
    method, step: the run's method, 'none' for the base, and its step.
    prompts: the prompts of the plan's accuracy.
  """
  metrics = tuple(dict.fromkeys(result.metric for result in results))
  rows = accuracy_rows(prompts, results)
  entries: dict[str, Any] = {}
  if LOSS in metrics:
    losses = paper_metric.scores(results, LOSS).items()
    entries['perplexity'] = {k: float(np.exp(v.value)) for k, v in losses}
  for name in metrics:
    if name in METRICS and METRICS[name].signature:
      entries[f'{name}_signature'] = METRICS[name].signature()
  ranked = {(r.task, r.prompt) for r in results if r.metric == ACCURACY}
  not_ranked = [p for p in prompts if (p.task, p.name) not in ranked]
  if not_ranked:
    entries['not_ranked'] = [
      {'task': p.task, 'prompt': p.name, 'examples': len(p.examples)}
      for p in not_ranked
    ]
  return entries | {
    'when': 'the base alone' if method == 'none' else f'after {step} steps',
    'step': step,
    'rows': rows,
    'means': mean_accuracies(rows),
    'scores': {
      name: {
        dataset: vars(score)
        for dataset, score in paper_metric.scores(results, name).items()
      }
      for name in metrics
    },
  }


def print_summary(
  summary: Mapping[str, Any], results: Sequence[Result]
) -> None:
  """Prints the scores, and warnings about examples."""
  validation = '; '.join(
    f'{key.replace("_", " ")} {value:.4f}'
    for key, value in summary.items()
    if key.startswith('validation_')
  )
  print(f'{summary["when"]}{validation and f": {validation}"}', flush=True)
  if results or not validation:
    terminal.show(
      results_table.table(results) or 'no held-out rows, nothing to judge by'
    )
  not_ranked = summary.get('not_ranked', ())
  if not_ranked:
    names = ', '.join(f'{p["task"]} {p["prompt"]!r}' for p in not_ranked)
    print(
      f'{len(not_ranked)} prompts have no accuracy: in all of their '
      f'{sum(p["examples"] for p in not_ranked)} examples two choices are the '
      f'same to the model: {names}'
    )
  for key, value in summary.items():
    if key.endswith('_signature'):
      print(f'{key.removesuffix("_signature")}: {value}')
  # All metrics of a prompt have the same examples, which count once.
  prompts = collections.defaultdict(list)
  for r in results:
    prompts[r.task, r.prompt].append((r.examples, r.cut, r.left_out))
  counts = [map(max, zip(*c, strict=True)) for c in prompts.values()]
  total, cut, num_unrankable = (
    map(sum, zip(*counts, strict=True)) if counts else (0, 0, 0)
  )
  for line in warnings(total, cut, num_unrankable, 'measured examples'):
    print(line)
  if cut:
    print('--inputs_length and --targets_length let more of them be seen')


def write(path: str, summary: Mapping[str, Any]) -> None:
  """Writes a summary as JSON, atomically."""
  files.write_text(path, json.dumps(summary, indent=2))
