# SPDX-License-Identifier: Apache-2.0
"""Work directories made by hand, as the commands leave them."""

import dataclasses
import json

from moepeft import config as config_lib
from moepeft.evaluation import results

from . import cases
from .cases import right as right

INFO = dataclasses.replace(
  cases.INFO,
  run='',
  base_parameters=1_000_000,
  parameters=20_000,
  step=7,
)
ROUNDS = ('anli_r1', 'anli_r2', 'anli_r3')
EIGHT = ('anli', 'cb', 'rte', 'wsc', 'wic', 'copa', 'winogrande', 'hellaswag')
TASKS = (*ROUNDS, *EIGHT[1:])


def info(folder, **changes):
  return dataclasses.replace(INFO, run=str(folder), **changes)


def make(folder, rows=(), changes=None, after=None, config=None):
  """A work directory with evaluation_eval.jsonl; returns its path.

  Args:
    rows: (task, prompt, metric, each[, weights]).
    changes: of INFO.
    after: contents of after.json.
    config: {dotted key: value} beside method, seed and steps.
  """
  folder.mkdir(parents=True, exist_ok=True)
  own = info(folder, **(changes or {}))
  c = config_lib.default()
  c.method, c.seed, c.steps = own.method, own.seed, own.step
  c.semantics, c.data.source, c.batch_size = own.semantics, 'jsonl', 5
  for key, value in (config or {}).items():
    *parents, last = key.split('.')
    tree = c
    for parent in parents:
      tree = tree[parent]
    tree[last] = value
  (folder / 'config.json').write_text(c.to_json())
  if after is not None:
    (folder / 'after.json').write_text(json.dumps(after))
  if rows:
    add(folder, own, rows)
  return str(folder)


def add(folder, own, rows):
  """Writes evaluation_<data>.jsonl of rows."""
  measured = [
    results.measurement(
      task,
      prompt,
      metric,
      range(len(each)),
      each,
      *weights,
      majority=0.5 if metric == 'accuracy' else None,
    )
    for task, prompt, metric, each, *weights in rows
  ]
  results.write(
    str(folder / f'evaluation_{own.data}.jsonl'),
    [results.make_result(own, m) for m in measured],
  )


def grid(of, n, tasks=TASKS):
  """All tasks with one prompt, of n examples right each."""
  return [(task, 'p', 'accuracy', right(of, n)) for task in tasks]
