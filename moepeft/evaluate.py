# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.evaluate --workdir=DIR: how good a run is.

Validation loss, and accuracies by rank classification (`moepeft.ranking`).
"""

import collections
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from moepeft import command, sharding, tasks
from moepeft.data import batching, jsonl, sources
from moepeft.data.vocabulary import Vocabulary
from moepeft.objectives import objective_of
from moepeft.ranking import Ranker
from moepeft.runs import open_run
from moepeft.tasks import Example
from moepeft.typing import Tree

SPLITS = ('seen', 'held_out')


def examples(config: ConfigDict, validation: Sequence[Example], train=None):
  """What a config evaluates: {(group, task, templates): examples}.

  Instances are held out in every entry; `templates` says whether the wording
  was seen in training.

  Args:
    validation: held-out rows of the training source.
    train: the training rows, which give closed templates their choices.
  """
  e = config.evaluation
  found = {}
  if config.data.source == 'tasks':
    for name in tasks.families(e.tasks):
      group = tasks.FAMILIES[name].group
      for label, which in zip(SPLITS, ('train', 'held_out'), strict=True):
        found[group, name, label] = tasks.examples(
          (name,),
          e.max_examples,
          seed=config.seed,
          split='held_out',
          templates=which,
        )
  else:
    ranked = jsonl.closed(train or (), validation)
    found |= _by_task('validation', ranked, e.max_examples)
  if e.path:
    ranked = jsonl.read(e.path, ranked=True)
    found |= _by_task('evaluation', ranked, e.max_examples)
  return found


def _by_task(group: str, rows: Iterable[Example], most: int):
  tables = collections.defaultdict(list)
  for row in rows:
    tables[group, row.task, ''].append(row)
  # Evenly spaced rows, so that every template has its share.
  return {
    key: [
      rows[i * len(rows) // min(most, len(rows))]
      for i in range(min(most, len(rows)))
    ]
    for key, rows in sorted(tables.items())
  }


class Judge:
  """What a run is judged by, read and checked before it starts."""

  def __init__(
    self,
    config: ConfigDict,
    model: Any,
    words: Vocabulary,
    validation: Sequence[Example],
    train: Sequence[Example] = (),
  ):
    """`validation` and `train` are rows of the source, as in `examples`."""
    e, data = config.evaluation, config.data
    self._mesh = sharding.make_mesh()
    self._rows = sharding.round_up(self._mesh, e.batch_size)
    lengths = data.inputs_length, data.targets_length
    self._batches = list(
      _batches(validation[: 8 * e.batch_size], words, self._rows, *lengths)
    )
    self._sets = examples(config, validation, train)
    self._ranker = Ranker(model, words, *lengths, e.batch_size, self._mesh)
    self._cut = {
      key: self._ranker.check(rows) for key, rows in self._sets.items()
    }
    objective = objective_of(config.objective)
    self._loss = jax.jit(
      lambda variables, batch: objective(model.apply, variables, batch, None)
    )

  def __call__(self, variables: Tree, when: str, step: int) -> dict[str, Any]:
    """Validation loss and accuracies, printed in a line and returned."""
    found = {'when': when, 'step': step}
    said = []
    if self._batches:
      found['validation_loss'] = self.validation_loss(variables)
      said.append(f'validation loss {found["validation_loss"]:.4f}')
    found['rows'] = self.accuracies(variables)
    found['means'] = means(found['rows'])
    if found['means']:
      shown = (f'{k} {v:.3f}' for k, v in found['means'].items())
      said.append(f'accuracy {", ".join(shown)}')
    said = '; '.join(said) or 'no held-out rows, nothing to judge by'
    print(f'{when} training: {said}', flush=True)
    if cut := sum(self._cut.values()):
      total = sum(map(len, self._sets.values()))
      print(
        f'{cut} of {total} examples are cut to config.data.inputs_length or '
        'targets_length',
        flush=True,
      )
    return found

  def validation_loss(self, variables: Tree) -> float:
    """Mean loss a real target token, in nats; no dropout."""
    total = tokens = 0.0
    for batch in self._batches:
      batch = sharding.shard_batch(self._mesh, batch)
      loss, aux = self._loss(variables, batch)
      total += float(loss) * float(aux['tokens'])
      tokens += float(aux['tokens'])
    return total / tokens

  def accuracies(self, variables: Tree) -> list[dict[str, Any]]:
    """A row for each entry of `examples`: group, task, templates, accuracy."""
    rows = []
    for (group, task, split), members in self._sets.items():
      predicted = self._ranker.predict(variables, members)
      labels = np.array([e.label for e in members])
      rows.append(
        {
          'group': group,
          'task': task,
          'templates': split,
          'examples': len(members),
          'cut': self._cut[group, task, split],
          'accuracy': float(np.mean(predicted == labels)),
          'chance': float(np.mean([1 / len(e.choices) for e in members])),
        }
      )
    return rows


def _batches(examples, words, size, inputs_length, targets_length):
  """Batches of `size` rows, the last filled up with rows of no real token."""
  for at in range(0, len(examples), size):
    part = examples[at : at + size]
    filled = [*part, *[part[-1]] * (size - len(part))]
    batch = batching.batch_at(
      filled.__getitem__, words, 0, size, inputs_length, targets_length
    )
    for key in ('inputs_mask', 'targets_mask'):
      batch[key][len(part) :] = False
    yield batch


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Mean accuracy of the tasks of each (group, templates)."""
  groups = collections.defaultdict(list)
  for row in rows:
    groups[f'{row["group"]} {row["templates"]}'.strip()].append(row['accuracy'])
  return {key: float(np.mean(values)) for key, values in groups.items()}


def table(before: Sequence[dict], after: Sequence[dict]) -> str:
  """Accuracies before and after as text, with means of the groups."""
  head = ('group', 'task', 'templates', 'n', 'chance', 'before', 'after')
  was = {(r['group'], r['task'], r['templates']): r for r in before}
  lines = [head]
  for row in after:
    key = row['group'], row['task'], row['templates']
    old = was.get(key)
    lines.append(
      (
        *key,
        str(row['examples']),
        f'{row["chance"]:.3f}',
        f'{old["accuracy"]:.3f}' if old else '-',
        f'{row["accuracy"]:.3f}',
      )
    )
  old = means(before)
  for key, value in means(after).items():
    first = f'{old[key]:.3f}' if key in old else '-'
    group, _, split = key.partition(' ')
    lines.append((group, 'MEAN', split, '', '', first, f'{value:.3f}'))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
    for line in lines
  )


def main(argv) -> None:
  del argv
  if not _WORKDIR.value:
    raise ValueError('--workdir is missing: name a run of moepeft.train')
  workdir = os.path.expanduser(_WORKDIR.value)
  config, model, variables, words, step = open_run(workdir)
  if _DATA.value:
    config.evaluation.path = _DATA.value
  if _MAX_EXAMPLES.value is not None:
    config.evaluation.max_examples = _MAX_EXAMPLES.value
  _, validation, rows = sources(config.data, config.seed)
  judge = Judge(config, model, words, validation, rows)
  found = judge(variables, 'after', step)
  print(table([], found['rows']))
  path = os.path.join(workdir, 'evaluation.json')
  with open(path, 'w') as f:
    json.dump(found, f, indent=2)
  print(f'wrote {path}')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', None, 'A run of moepeft.train.')
  _DATA = flags.DEFINE_string('data', None, 'Rows to rank; see jsonl.py.')
  _MAX_EXAMPLES = flags.DEFINE_integer(
    'max_examples', None, "Examples of a task at most; by default the run's."
  )
  command.run(main)
