# SPDX-License-Identifier: Apache-2.0
"""What the rows of an evaluation come to, as JSON and for a terminal."""

import collections
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepeft.core import files, terminal
from moepeft.evaluation import scores, text_metrics
from moepeft.evaluation.eval_sets import Prompt
from moepeft.evaluation.runner import Work
from moepeft.evaluation.scores import Row
from moepeft.evaluation.tables import terminal as tables_terminal
from moepeft.evaluation.validator import means, warnings
from moepeft.inference.loaded_model import LoadedModel


def by_task(prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[dict]:
  """Accuracies of tasks over all of their prompts' examples.

  Returns:
    As `Judge.accuracies`: group, task, templates, examples, cut, accuracy,
    chance.
  """
  groups = {(p.task, p.name): (p.group, p.task, p.templates) for p in prompts}
  tables = collections.defaultdict(list)
  for row in rows:
    if row.measure == 'accuracy':
      tables[groups[row.task, row.prompt]].append(row)
  found = []
  for (group, task, templates), own in tables.items():
    counts = [row.examples for row in own]
    found.append(
      {
        'group': group,
        'task': task,
        'templates': templates,
        'examples': sum(counts),
        'cut': sum(row.cut for row in own),
        'accuracy': float(np.average([r.value for r in own], weights=counts)),
        'chance': float(np.average([r.chance for r in own], weights=counts)),
      }
    )
  return found


def of(run: LoadedModel, work: Work, rows: Sequence[Row]) -> dict[str, Any]:
  """What the rows come to: by task, by group, and the paper's measure."""
  tasks = by_task(work.get('accuracy', ()), rows)
  named, more = {row.measure for row in rows}, {}
  if 'loss' in named:
    losses = scores.scores(rows, 'loss').items()
    more['perplexity'] = {k: float(np.exp(v.value)) for k, v in losses}
  if 'bleu' in named:
    more['bleu_signature'] = text_metrics.bleu_signature()
  ranked = {(row.task, row.prompt) for row in rows if row.measure == 'accuracy'}
  lost = [p for p in work.get('accuracy', ()) if (p.task, p.name) not in ranked]
  if lost:
    more['not_ranked'] = [
      {'task': p.task, 'prompt': p.name, 'examples': len(p.examples)}
      for p in lost
    ]
  return more | {
    'when': 'the base alone'
    if run.method == 'none'
    else f'after {run.step} steps',
    'step': run.step,
    'rows': tasks,
    'means': means(tasks),
    'scores': {
      name: {
        key: vars(score) for key, score in scores.scores(rows, name).items()
      }
      for name in dict.fromkeys(row.measure for row in rows)
    },
  }


def tell(found: dict[str, Any], rows: Sequence[Row]) -> None:
  """Prints the scores, and what of the rows is not what was asked for."""
  said = '; '.join(
    f'{key.replace("_", " ")} {value:.4f}'
    for key, value in found.items()
    if key.startswith('validation_')
  )
  print(f'{found["when"]}{said and f": {said}"}', flush=True)
  if rows or not said:
    terminal.show(
      tables_terminal.table(rows) or 'no held-out rows, nothing to judge by'
    )
  lost = found.get('not_ranked', ())
  if lost:
    names = ', '.join(f'{p["task"]} {p["prompt"]!r}' for p in lost)
    print(
      f'{len(lost)} prompts have no accuracy: in all of their '
      f'{sum(p["examples"] for p in lost)} examples two choices are the same '
      f'to the model: {names}'
    )
  if 'bleu_signature' in found:
    print(f'bleu: {found["bleu_signature"]}')
  # A prompt's examples are the same ones in all of its measures.
  prompts = collections.defaultdict(list)
  for row in rows:
    prompts[row.task, row.prompt].append((row.examples, row.cut, row.left_out))
  most = [map(max, zip(*own, strict=True)) for own in prompts.values()]
  total, cut, alike = map(sum, zip(*most, strict=True)) if most else (0, 0, 0)
  for line in warnings(total, cut, alike, 'measured examples'):
    print(line)
  if cut:
    print('--inputs_length and --targets_length let more of them be seen')


def write(path: str, found: dict[str, Any]) -> None:
  """Writes it all or not at all."""
  files.write_text(path, json.dumps(found, indent=2))
