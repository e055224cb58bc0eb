# SPDX-License-Identifier: Apache-2.0
"""Held-out examples by task and prompt, for evaluations."""

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
from moepeft.data.readers import READERS, jsonl_rows
from moepeft.tasks import Example

SPLITS = ('seen', 'held_out')
# Above this many different targets, a template's answers count as open.
_MAX_CHOICES = 8
# Groups of rows that no run was trained on, and of the run's own data.
EVALUATION, VALIDATION = 'evaluation', 'validation'


@dataclasses.dataclass(frozen=True)
class PromptExamples:
  """The examples of one prompt of a task.

  Attributes:
    group: of an embedded task, or 'validation' or 'evaluation'.
    task: a dataset or an embedded task.
    name: of the prompt; '' where its rows have none, or it stands for all.
    examples: each with an `idx` that its task's other prompts share.
  """

  group: str
  task: str
  name: str
  examples: tuple[Example, ...]

  @property
  def templates(self) -> str:
    """The templates' split: one of `SPLITS` in embedded tasks, else ''."""
    return '' if self.group in (VALIDATION, EVALUATION) else self.name


def training_prompts(
  config: ConfigDict, held_out: Sequence[Example], train=None
) -> list[PromptExamples]:
  """The prompts that are ranked before and after training.

  Their examples are held out; the name of a prompt of embedded tasks says
  whether its templates are of training.

  Args:
    held_out: rows of the training source.
    train: the training rows, which give closed templates their choices.
  """
  e = config.evaluation
  if READERS.lookup(config.data.source).evaluates_tasks:
    ranked_prompts = _embedded_prompts(config)
  else:
    ranked = with_closed_choices(train or (), examples_of(held_out))
    ranked_prompts = _by_task(VALIDATION, ranked, e.max_examples)
  if e.path:
    rows = jsonl_rows.read(e.path, ranked=True)
    for note in rows.notes(e.path):
      print(note, file=sys.stderr)
    ranked_prompts += _by_task(EVALUATION, rows, e.max_examples)
  return ranked_prompts


def validation_rows(
  config: ConfigDict, sources: TrainingData, collator: Collator
) -> list:
  """Held-out examples, as ids, that the validation loss is of."""
  e = config.evaluation
  return sources.validation(collator, e.max_batches * e.batch_size)


def examples_of(held_out: Sequence) -> list[Example]:
  """The rows that are examples yet: texts and conversations are ids."""
  return [e for e in held_out if isinstance(e, Example)]


def _embedded_prompts(config: ConfigDict) -> list[PromptExamples]:
  return [
    PromptExamples(
      tasks.TASKS[name].group,
      name,
      split,
      tuple(
        tasks.examples(
          (name,),
          config.evaluation.max_examples,
          seed=config.seed,
          split='held_out',
          templates=templates,
        )
      ),
    )
    for name in tasks.task_names(config.evaluation.tasks)
    for split, templates in zip(SPLITS, ('train', 'held_out'), strict=True)
  ]


def _by_task(
  group: str, rows: Iterable[Example], max_examples: int
) -> list[PromptExamples]:
  """Rows by task, whatever their prompts."""
  by_task = collections.defaultdict(list)
  for row in rows:
    by_task[row.task].append(row)
  return [
    PromptExamples(group, task, '', tuple(evenly_spaced(of_task, max_examples)))
    for task, of_task in sorted(by_task.items())
  ]


def prompts(
  group: str, rows: Iterable[Example], max_examples: int
) -> list[PromptExamples]:
  """Rows by task and prompt, the same examples in all prompts of a task.

  Examples are spread evenly over those that a task has; a prompt that lacks
  some of them has fewer. Rows without an `idx` are counted in their prompt.

  Args:
    max_examples: of a prompt.
  """
  tables = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    of_prompt = tables[row.task][row.template]
    of_prompt.append(_with_idx(row, len(of_prompt)))
  result = []
  for task, by_name in sorted(tables.items()):
    numbers = sorted({e.idx for e in sum(by_name.values(), [])})
    chosen = set(evenly_spaced(numbers, max_examples))
    for name, of_prompt in sorted(by_name.items()):
      examples = tuple(e for e in of_prompt if e.idx in chosen)
      result += (
        [PromptExamples(group, task, name, examples)] if examples else []
      )
  return result


def prompts_with_choices(
  config: ConfigDict, sources: TrainingData
) -> list[PromptExamples]:
  """Prompts of a run's held-out rows that have choices.

  The rows of config.evaluation.path are other data: training ranks them, and
  `moepeft.evaluate --data` gives them rows under their own name.
  Of the embedded tasks a prompt stands for the wordings that were seen in
  training, or for those that were not.
  """
  e = config.evaluation
  if READERS.lookup(config.data.source).evaluates_tasks:
    return _embedded_prompts(config)
  rows = with_closed_choices(sources.rows, examples_of(sources.held_out))
  return prompts(VALIDATION, rows, e.max_examples)


def whole_tasks(
  rows: Iterable[Example], max_examples: int
) -> list[PromptExamples]:
  """Rows by task, whatever their prompts, at most so many of each.

  Rows without an `idx` are counted in their task.
  """
  return [
    dataclasses.replace(
      prompt,
      examples=tuple(_with_idx(e, i) for i, e in enumerate(prompt.examples)),
    )
    for prompt in _by_task(VALIDATION, rows, max_examples)
  ]


def _with_idx(row: Example, place: int) -> Example:
  """A row with its place as the `idx` that it lacks."""
  return row if row.idx >= 0 else dataclasses.replace(row, idx=place)


def digest(rows: Sequence[Example]) -> str | None:
  """12 hexadecimal digits that tell data of one name apart; None of no rows.

  They are of the SHA-256 of all fields of the rows, in their order.
  """
  if not rows:
    return None
  sha256 = hashlib.sha256()
  for e in rows:
    row = (e.task, e.template, e.idx, e.inputs, e.targets, e.choices, e.label)
    sha256.update(json.dumps(row).encode() + b'\n')
  return sha256.hexdigest()[:12]


def with_closed_choices(
  train: Sequence[Example], validation: Sequence[Example]
) -> list[Example]:
  """The validation rows of templates with few answers, with their choices.

  The choices of a template are the targets that occur in training; rows whose
  own target is not among them are left out.
  """
  answers = collections.defaultdict(set)
  for e in train:
    answers[e.task, e.template].add(e.targets)
  ranked = []
  for e in validation:
    choices = tuple(sorted(answers[e.task, e.template]))
    if 2 <= len(choices) <= _MAX_CHOICES and e.targets in choices:
      ranked.append(
        Example(
          **{
            **vars(e),
            'choices': choices,
            'label': choices.index(e.targets),
          }
        )
      )
  return ranked
