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
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moepeft import command, sharding, tasks
from moepeft import config as config_lib
from moepeft.data import Sources, batching, jsonl, sources
from moepeft.data.packing import Pair
from moepeft.data.source import spread
from moepeft.data.vocabulary import Vocabulary
from moepeft.objectives import objective_of
from moepeft.ranking import Ranker
from moepeft.runs import open_run
from moepeft.tasks import Example
from moepeft.typing import Tree

SPLITS = ('seen', 'held_out')
# Batches of which the validation loss is taken.
_BATCHES = 8


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
    found |= rows_to_rank(e.path, e.max_examples)
  return found


def rows_to_rank(path: str, most: int):
  """The same of a file or directory of rows with choices."""
  return _by_task('evaluation', jsonl.read(path, ranked=True), most)


def pairs_to_judge(
  config: ConfigDict, found: Sources, words: Vocabulary
) -> list[Pair]:
  """Held-out examples, as ids, whose loss a run is judged by."""
  data = config.data
  return found.validation(
    words,
    data.inputs_length,
    data.targets_length,
    count=_BATCHES * config.evaluation.batch_size,
  )


def _by_task(group: str, rows: Iterable[Example], most: int):
  tables = collections.defaultdict(list)
  for row in rows:
    tables[group, row.task, ''].append(row)
  return {key: spread(rows, most) for key, rows in sorted(tables.items())}


class Judge:
  """What a run is judged by, read and checked before it starts."""

  def __init__(
    self,
    config: ConfigDict,
    model: Any,
    words: Vocabulary,
    validation: Sequence[Pair],
    sets: dict[tuple[str, str, str], list[Example]],
    mesh: Mesh | None = None,
  ):
    """`validation` is from `pairs_to_judge`, `sets` from `examples`.

    `mesh` is the one that the variables lie on; by default, all devices.
    """
    e, data = config.evaluation, config.data
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._rows = sharding.round_up(self._mesh, e.batch_size)
    lengths = data.inputs_length, data.targets_length
    self._batches = list(_batches(validation, self._rows, *lengths))
    self._sets, self._cut, self._alike = {}, {}, 0
    self._ranker = Ranker(model, words, *lengths, e.batch_size, self._mesh)
    for key, rows in sets.items():
      seen = [(row, *self._ranker.look(row)) for row in rows]
      kept = [row for row, _, alike in seen if not alike]
      self._alike += len(rows) - len(kept)
      if kept:
        self._sets[key] = kept
        self._cut[key] = sum(cut for _, cut, alike in seen if not alike)
    objective = objective_of(config.objective)

    def count(variables, batch):
      _, aux = objective(model.apply, variables, batch, None)
      return aux['nll'], aux['tokens']

    self._count = jax.jit(count)

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
    print(f'{when}: {said}', flush=True)
    for line in self._warnings():
      print(line, flush=True)
    return found

  def _warnings(self) -> list[str]:
    total, cut = sum(map(len, self._sets.values())), sum(self._cut.values())
    lines = []
    if cut:
      lines.append(
        f'{cut} of {total} ranked examples are cut to config.data.inputs_length'
        ' or config.data.targets_length'
      )
    if self._alike:
      lines.append(
        f'{self._alike} examples are left out: two of their choices are the '
        'same to the tokenizer, or after config.data.targets_length'
      )
    return lines

  def validation_loss(self, variables: Tree) -> float:
    """Mean -log p of a real target token, in nats; no dropout.

    Whatever config.loss says, so that runs can be compared.
    """
    total = tokens = 0.0
    for batch in self._batches:
      batch = sharding.shard_whole_batch(self._mesh, batch)
      nll, real = self._count(variables, batch)
      total += float(nll)
      tokens += float(real)
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


def _batches(pairs, size, inputs_length, targets_length):
  """Batches of `size` rows, the last filled up with rows of no real token."""
  for at in range(0, len(pairs), size):
    part = pairs[at : at + size]
    filled = [*part, *[part[-1]] * (size - len(part))]
    x, y = zip(*filled, strict=True)
    batch = batching.seq2seq(x, y, inputs_length, targets_length)
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
  """Accuracies before and after as text, with means of the groups.

  Columns that say nothing are left out: templates without any, `before`
  without rows.
  """
  head = ('group', 'task', 'templates', 'n', 'chance', 'before', 'after')
  keys = [(r['group'], r['task'], r['templates']) for r in after]
  was = dict(((r['group'], r['task'], r['templates']), r) for r in before)
  lines = [head]
  for key, row in zip(keys, after, strict=True):
    lines.append(
      (
        *key,
        str(row['examples']),
        f'{row["chance"]:.3f}',
        f'{was[key]["accuracy"]:.3f}' if key in was else '-',
        f'{row["accuracy"]:.3f}',
      )
    )
  old = means([was[key] for key in keys if key in was])
  for key, value in means(after).items():
    first = f'{old[key]:.3f}' if key in old else '-'
    group, _, split = key.partition(' ')
    lines.append((group, 'MEAN', split, '', '', first, f'{value:.3f}'))
  unused = {'templates'} if not any(split for _, _, split in keys) else set()
  unused |= set() if before else {'before'}
  lines = [
    [cell for cell, name in zip(line, head, strict=True) if name not in unused]
    for line in lines
  ]
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
  config, model, variables, words, step = open_run(workdir, _CHECKPOINT.value)
  if _MAX_EXAMPLES.value is not None:
    config.evaluation.max_examples = _MAX_EXAMPLES.value
  config_lib.check(config)
  if _DATA.value:
    path = os.path.expanduser(_DATA.value)
    validation = ()
    sets = rows_to_rank(path, config.evaluation.max_examples)
    name = os.path.basename(path.rstrip('/')).partition('.')[0]
    output = os.path.join(workdir, f'evaluation_{name}.json')
  else:
    found = sources(config.data, config.seed)
    validation = pairs_to_judge(config, found, words)
    sets = examples(config, found.held_out, found.rows)
    output = os.path.join(workdir, 'evaluation.json')
  judge = Judge(config, model, words, validation, sets)
  found = judge(variables, f'after {step} steps', step)
  print(table([], found['rows']))
  output = os.path.expanduser(_OUTPUT.value or output)
  with open(output, 'w') as f:
    json.dump(found, f, indent=2)
  print(f'wrote {output}')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', None, 'A run of moepeft.train.')
  _CHECKPOINT = flags.DEFINE_string(
    'checkpoint', '', "Its step, or 'best'; by default the latest."
  )
  _DATA = flags.DEFINE_string(
    'data', None, 'Rows to rank, and nothing else; see moepeft/data/jsonl.py.'
  )
  _MAX_EXAMPLES = flags.DEFINE_integer(
    'max_examples', None, "Examples of a task at most; by default the run's."
  )
  _OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Where the figures go: by default evaluation.json in the work directory, '
    'with --data evaluation_<its name>.json.',
  )
  command.run(main)
