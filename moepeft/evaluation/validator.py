# SPDX-License-Identifier: Apache-2.0
"""What a run is judged by while it trains: validation loss and accuracies."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moepeft.core import sharding
from moepeft.core.progress import Pass
from moepeft.core.types import Tree
from moepeft.data.batching.collators import (
  Collator,
  make_model_collator,
  scoring_lengths,
)
from moepeft.data.tokenizers.tokenizer import Tokenizer
from moepeft.evaluation.rank_classification import NotFinite, Ranked, Ranker
from moepeft.evaluation.tables.terminal import columns
from moepeft.objectives import Objective, build_validation_objective
from moepeft.peft.methods.prompt_tuning import before
from moepeft.tasks import Example

Key = tuple[str, str, str]


class Judge:
  """What a run is judged by, read and checked before it starts."""

  def __init__(
    self,
    config: ConfigDict,
    model: Any,
    words: Tokenizer,
    validation: Sequence,
    sets: dict[Key, list[Example]],
    mesh: Mesh | None = None,
    own: Collator | None = None,
    objective: Objective | None = None,
  ):
    """`validation` and `sets` are from `moepeft.evaluation.eval_sets`.

    Args:
      mesh: the one that the variables lie on; by default, all devices.
      own: the form of `validation`; by default the model's.
      objective: of `objectives.build_validation_objective`; None for one
        that needs no reference.
    """
    e, data = config.evaluation, config.data
    self._mesh = sharding.make_mesh() if mesh is None else mesh
    self._rows = sharding.round_up(self._mesh, e.batch_size)
    own = own or make_model_collator(
      data, words, model, config.seed, before(model)
    )
    self._batches = list(_batches(validation, self._rows, own))
    lengths = scoring_lengths(data, model)
    self._ranker = Ranker(model, words, *lengths, e.batch_size, self._mesh)
    self._sets: dict[Key, list[tuple[Example, Ranked]]] = {}
    self._alike = 0
    for key, rows in sets.items():
      pairs = zip(rows, self._ranker.prepare(rows), strict=True)
      kept = [(row, ids) for row, ids in pairs if not ids.alike]
      self._alike += len(rows) - len(kept)
      if kept:
        self._sets[key] = kept
    objective = objective or build_validation_objective(config)

    def count(variables, batch):
      batch = objective.prepare(model.apply, variables, batch)
      total, aux = objective(model.apply, variables, batch, None)
      whole = jnp.stack([total, aux['weight'].astype(total.dtype)])
      return {'loss': whole} | aux.get('metrics', {})

    self._count = jax.jit(count)

  def __call__(
    self,
    variables: Tree,
    when: str,
    step: int,
    validated: dict[str, float] | None = None,
  ) -> dict[str, Any]:
    """Validation loss and accuracies, printed in a line and returned.

    Args:
      validated: what `validation` found of these variables, if it was asked.

    Where the weights are not finite there are no accuracies, and a line says
    so: hours of training are not lost for it.
    """
    found = {'when': when, 'step': step}
    said = []
    every = [ids for kept in self._sets.values() for _, ids in kept]
    batches = 0 if validated else self.validation_rows
    shown = Pass(batches + len(every), when)
    if self._batches:
      validated = validated or self.validation(variables, shown)
      found |= validated
      said += [
        f'{key.replace("_", " ")} {value:.4f}'
        for key, value in validated.items()
      ]
    try:
      found['rows'] = self.accuracies(variables, shown)
    except NotFinite as e:
      found['rows'] = []
      said.append(f'no accuracy: {e}')
    shown.close()
    found['means'] = means(found['rows'])
    if found['means']:
      shown = (f'{k} {v:.3f}' for k, v in found['means'].items())
      said.append(f'accuracy {", ".join(shown)}')
    said = '; '.join(said) or 'no held-out rows, nothing to judge by'
    print(f'{when}: {said}', flush=True)
    for line in warnings(len(every), sum(e.cut for e in every), self._alike):
      print(line, flush=True)
    return found

  def validation_loss(self, variables: Tree) -> float:
    """Mean -log p of a real target token, in nats; no dropout.

    Whatever config.loss says, so that runs can be compared. Of an objective
    that compares answers, its own loss.
    """
    return self.validation(variables)['validation_loss']

  @property
  def validation_rows(self) -> int:
    """Rows that `validation` reads, those that fill its last batch included."""
    return self._rows * len(self._batches)

  def validation(
    self,
    variables: Tree,
    progress: Callable[[int], None] = lambda done: None,
  ) -> dict[str, float]:
    """`validation_loss`, and what the objective tells beside it.

    Args:
      progress: called with the rows of each batch that is done.

    Returns:
      {'validation_loss': ..., 'validation_margins': ...}; a figure of which
      there is nothing is left out.
    """
    sums = collections.Counter()
    for batch in self._batches:
      batch = sharding.shard_whole_batch(self._mesh, batch)
      for key, pair in self._count(variables, batch).items():
        total, count = map(float, pair)
        sums[key, 'total'] += total
        sums[key, 'count'] += count
      progress(self._rows)
    names = dict.fromkeys(key for key, _ in sums)
    return {
      f'validation_{key}': sums[key, 'total'] / sums[key, 'count']
      for key in names
      if sums[key, 'count']
    }

  def accuracies(
    self,
    variables: Tree,
    progress: Callable[[int], None] = lambda done: None,
  ) -> list[dict[str, Any]]:
    """A row for each entry of `sets`: group, task, templates, accuracy.

    Args:
      progress: called with the number of examples that were ranked.
    """
    # All at once: fewer batches that are not full.
    every = [ids for kept in self._sets.values() for _, ids in kept]
    predicted = iter(self._ranker.predict(variables, every, progress))
    rows = []
    for (group, task, split), kept in self._sets.items():
      right = [next(predicted) == row.label for row, _ in kept]
      rows.append(
        {
          'group': group,
          'task': task,
          'templates': split,
          'examples': len(kept),
          'cut': sum(ids.cut for _, ids in kept),
          'accuracy': float(np.mean(right)),
          'chance': float(np.mean([1 / len(row.choices) for row, _ in kept])),
        }
      )
    return rows


def warnings(
  total: int, cut: int, alike: int, what: str = 'ranked examples'
) -> list[str]:
  """Lines about examples that are not what was asked for."""
  lines = []
  if cut:
    lines.append(
      f'{cut} of {total} {what} are cut to config.data.inputs_length'
      ' or config.data.targets_length'
    )
  if alike:
    lines.append(
      f'{alike} examples are left out: two of their choices are the '
      'same to the tokenizer, or after config.data.targets_length'
    )
  return lines


def _batches(encoded: Sequence, size: int, own: Collator):
  """Batches of `size` rows, the last filled up with rows of no real token."""
  if not encoded:
    return
  # Packed where training is: the same sums of fewer tokens.
  rows = own.rows(0, encoded)
  count = len(next(iter(rows.values())))
  for at in range(0, count, size):
    real = min(size, count - at)
    places = np.minimum(np.arange(at, at + size), count - 1)
    batch = {key: array[places] for key, array in rows.items()}
    for key in batch:
      if key.endswith('_mask'):
        batch[key][real:] = False
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
  return columns(lines)
