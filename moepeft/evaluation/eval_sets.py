# SPDX-License-Identifier: Apache-2.0
"""Which examples a run is judged by."""

import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from moepeft import tasks
from moepeft.data import TrainingData
from moepeft.data.batching.collators import Collator
from moepeft.data.dataset import evenly_spaced
from moepeft.data.readers import jsonl
from moepeft.tasks import Example

SPLITS = ('seen', 'held_out')
# Groups of rows that no run was trained on, and of the run's own data.
EVALUATION, VALIDATION = 'evaluation', 'validation'


def examples(config: ConfigDict, validation: Sequence[Example], train=None):
  """What is ranked in training: {(group, task, templates): examples}.

  Instances are held out in every entry; `templates` says whether the wording
  was seen in training.

  Args:
    validation: held-out rows of the training source.
    train: the training rows, which give closed templates their choices.
  """
  e = config.evaluation
  if config.data.source == 'tasks':
    found = _families(config)
  else:
    ranked = jsonl.with_closed_choices(train or (), examples_of(validation))
    found = _by_task(VALIDATION, ranked, e.max_examples)
  if e.path:
    rows = jsonl.read(e.path, ranked=True)
    for note in rows.notes(e.path):
      print(note, file=sys.stderr)
    found |= _by_task(EVALUATION, rows, e.max_examples)
  return found


def pairs_to_judge(
  config: ConfigDict, found: TrainingData, own: Collator
) -> list:
  """Held-out examples, as ids, whose loss a run is judged by."""
  e = config.evaluation
  return found.validation(own, e.batches * e.batch_size)


def examples_of(held_out: Sequence) -> list[Example]:
  """Those that are examples yet: texts and conversations are ids."""
  return [e for e in held_out if isinstance(e, Example)]


def _families(config: ConfigDict):
  e, found = config.evaluation, {}
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
  return found


def _by_task(group: str, rows: Iterable[Example], most: int):
  tables = collections.defaultdict(list)
  for row in rows:
    tables[group, row.task, ''].append(row)
  return {
    key: evenly_spaced(rows, most) for key, rows in sorted(tables.items())
  }


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The examples of one prompt of a task.

  Attributes:
    group: of tasks: one of the embedded ones', 'validation' or 'evaluation'.
    task: a dataset or family.
    name: of the prompt; '' where its rows have none, or it stands for all.
    examples: each with an `idx` that its task's other prompts share.
  """

  group: str
  task: str
  name: str
  examples: tuple[Example, ...]

  @property
  def templates(self) -> str:
    """Which wordings: one of `SPLITS` in the embedded tasks, else ''."""
    return self.name if self.group in tasks.GROUPS else ''


def prompts(group: str, rows: Iterable[Example], most: int) -> list[Prompt]:
  """Rows by task and prompt, the same examples in all prompts of a task.

  Examples are spread evenly over those that a task has; a prompt that lacks
  some of them has fewer. Rows without an `idx` are counted in their prompt.

  Args:
    most: examples of a prompt.
  """
  tables = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    own = tables[row.task][row.template]
    numbered = row.idx >= 0
    own.append(row if numbered else dataclasses.replace(row, idx=len(own)))
  found = []
  for task, by_name in sorted(tables.items()):
    taken = set(
      evenly_spaced(sorted({e.idx for e in sum(by_name.values(), [])}), most)
    )
    for name, own in sorted(by_name.items()):
      kept = tuple(e for e in own if e.idx in taken)
      found += [Prompt(group, task, name, kept)] if kept else []
  return found


def own_prompts(config: ConfigDict, found: TrainingData) -> list[Prompt]:
  """What of a run's own held-out rows has choices.

  The rows of config.evaluation.path are other data: training ranks them, and
  `moepeft.evaluate --data` gives them rows under their own name.
  Of the embedded tasks a prompt stands for the wordings that were seen in
  training, or for those that were not.
  """
  e = config.evaluation
  if config.data.source == 'tasks':
    return [
      Prompt(*key, examples=tuple(rows))
      for key, rows in _families(config).items()
    ]
  rows = jsonl.with_closed_choices(found.rows, examples_of(found.held_out))
  return prompts(VALIDATION, rows, e.max_examples)


def whole_tasks(rows: Iterable[Example], most: int) -> list[Prompt]:
  """Rows by task, whatever their prompts, at most so many of each.

  Rows without an `idx` are counted in their task.
  """
  return [
    Prompt(VALIDATION, task, '', tuple(map(_numbered, own, range(len(own)))))
    for (_, task, _), own in _by_task(VALIDATION, rows, most).items()
  ]


def _numbered(row: Example, place: int) -> Example:
  return row if row.idx >= 0 else dataclasses.replace(row, idx=place)


def digest(rows: Sequence[Example]) -> str | None:
  """12 hexadecimal digits that tell data of one name apart; None of no rows.

  They are of the SHA-256 of all that the rows say, in their order.
  """
  if not rows:
    return None
  found = hashlib.sha256()
  for e in rows:
    said = (e.task, e.template, e.idx, e.inputs, e.targets, e.choices, e.label)
    found.update(json.dumps(said).encode() + b'\n')
  return found.hexdigest()[:12]
