# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.evaluate --workdir=DIR: rank classification of a run.

As in T0 and the paper, the likeliest choice wins.

A choice's score is the sum of its tokens' log-probabilities, EOS included,
not normalised by length; ties go to the first.
"""

import collections
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from moepeft import command, tasks
from moepeft.data import batching, jsonl, sources
from moepeft.data.vocabulary import Vocabulary
from moepeft.models.t5 import context
from moepeft.objectives.seq2seq import (
  objective,
  sequence_log_likelihood,
  shift_right,
)
from moepeft.runs import open_run
from moepeft.tasks import Example
from moepeft.typing import Array, Batch, Tree

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
    found |= _by_task('evaluation', jsonl.read(e.path), e.max_examples)
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


def score_choices(
  model: Any, variables: Tree, batch: Batch, targets: Array, mask: Array
) -> Array:
  """Log-likelihoods [b, c] of c choices for each input.

  The encoder runs once for an input and is shared by its choices.

  Args:
    batch: inputs [b, s] and inputs_mask.
    targets: int [b, c, t]; mask: bool of the same shape.
  """
  b, c, t = targets.shape
  bound = model.bind(variables)
  source_ctx = context(batch, 'inputs', batch['inputs'], train=False)
  encoded = bound.encode(batch['inputs'], source_ctx)
  repeat = functools.partial(jnp.repeat, repeats=c, axis=0)
  flat, real = targets.reshape(b * c, t), mask.reshape(b * c, t)
  ctx = source_ctx.replace(token_mask=real)
  source_ctx = jax.tree.map(repeat, source_ctx)
  logits = bound.decode(shift_right(flat), ctx, repeat(encoded), source_ctx)
  return sequence_log_likelihood(logits, flat, real).reshape(b, c)


class Ranker:
  """Ranks examples with one compiled program a shape.

  Lengths and the number of choices are rounded up to powers of two and rows to
  `batch_size`, so that few shapes occur.
  """

  def __init__(
    self,
    model: Any,
    vocabulary: Vocabulary,
    inputs_length: int,
    targets_length: int,
    batch_size: int,
  ):
    self._score = jax.jit(functools.partial(score_choices, model))
    self._vocabulary = vocabulary
    self._lengths = inputs_length, targets_length
    self._batch_size = batch_size

  def predict(self, variables: Tree, rows: Sequence[Example]) -> np.ndarray:
    """The place of the likeliest choice of each example: int [rows]."""
    encoded = [self._encode(row) for row in rows]
    groups = collections.defaultdict(list)
    for i, (x, choices) in enumerate(encoded):
      inputs, targets = self._lengths
      shape = (
        _round(len(choices), 2, 1 << 30),
        _round(len(x), 64, inputs),
        _round(max(map(len, choices)), 16, targets),
      )
      groups[shape].append(i)
    predicted = np.zeros(len(rows), np.int64)
    for (count, s, t), members in sorted(groups.items()):
      for at in range(0, len(members), self._batch_size):
        part = members[at : at + self._batch_size]
        scores = self._scores(variables, encoded, part, count, s, t)
        for i, row in zip(part, scores, strict=False):
          predicted[i] = np.argmax(row[: len(rows[i].choices)])
    return predicted

  def _scores(self, variables, encoded, part, count, s, t) -> np.ndarray:
    filled = part + [part[-1]] * (self._batch_size - len(part))
    inputs = [encoded[i][0] for i in filled]
    choices = []
    for i in filled:
      own = encoded[i][1]
      choices += own + [own[-1]] * (count - len(own))
    arrays = batching.seq2seq(inputs, inputs, s, s)
    batch = {key: arrays[key] for key in ('inputs', 'inputs_mask')}
    answers = batching.seq2seq(choices, choices, t, t)
    shape = (len(filled), count, t)
    return np.asarray(
      self._score(
        variables,
        batch,
        answers['targets'].reshape(shape),
        answers['targets_mask'].reshape(shape),
      )
    )

  def _encode(self, row: Example):
    inputs, targets = self._lengths
    one = functools.partial(
      batching.encode, self._vocabulary, inputs=inputs, targets=targets
    )
    coded = [
      one(Example(**{**vars(row), 'targets': choice})) for choice in row.choices
    ]
    return coded[0][0], [y for _, y, _ in coded]


def _round(length: int, least: int, most: int) -> int:
  return min(max(least, 1 << (length - 1).bit_length()), most)


def accuracies(
  ranker: Ranker, variables: Tree, sets: dict, say: Callable = print
) -> list[dict[str, Any]]:
  """A row for each entry of `examples`: group, task, templates, accuracy."""
  rows = []
  for (group, task, split), members in sets.items():
    predicted = ranker.predict(variables, members)
    labels = np.array([e.label for e in members])
    chance = float(np.mean([1 / len(e.choices) for e in members]))
    rows.append(
      {
        'group': group,
        'task': task,
        'templates': split,
        'examples': len(members),
        'accuracy': float(np.mean(predicted == labels)),
        'chance': chance,
      }
    )
  return rows


def validation_loss(
  model: Any, variables: Tree, batches: Sequence[Batch]
) -> float:
  """Mean loss a target token over batches, in nats; no dropout."""
  run = jax.jit(
    lambda variables, batch: objective(model.apply, variables, batch, None)
  )
  total = tokens = 0.0
  for batch in batches:
    loss, aux = run(variables, batch)
    total += float(loss) * float(aux['tokens'])
    tokens += float(aux['tokens'])
  return total / tokens


def judge(
  config: ConfigDict,
  model: Any,
  ranker: Ranker,
  validation: Sequence[Example],
  train: Sequence[Example],
  words: Vocabulary,
  variables: Tree,
  when: str,
  step: int,
) -> dict[str, Any]:
  """Validation loss and accuracies, printed in a line and returned."""
  data, size = config.data, config.evaluation.batch_size
  some = validation[: 8 * size]
  batches = [
    batching.batch_at(
      lambda i: some[i],
      words,
      number,
      size,
      data.inputs_length,
      data.targets_length,
    )
    for number in range(len(some) // size)
  ]
  found = {'when': when, 'step': step}
  if batches:
    found['validation_loss'] = validation_loss(model, variables, batches)
  sets = examples(config, validation, train)
  found['rows'] = accuracies(ranker, variables, sets)
  found['means'] = means(found['rows'])
  shown = ', '.join(f'{k} {v:.3f}' for k, v in found['means'].items())
  loss = f'validation loss {found["validation_loss"]:.4f}; ' if batches else ''
  print(f'{when} training: {loss}accuracy {shown}', flush=True)
  return found


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
  if _MAX_EXAMPLES.value:
    config.evaluation.max_examples = _MAX_EXAMPLES.value
  data = config.data
  _, validation, rows = sources(data, config.seed)
  size = config.evaluation.batch_size
  ranker = Ranker(model, words, data.inputs_length, data.targets_length, size)
  found = judge(
    config, model, ranker, validation, rows, words, variables, 'after', step
  )
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
