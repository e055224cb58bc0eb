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
# A template with more different targets is open-ended, not multiple choice.
_MAX_CHOICES = 8
# Groups: rows of config.evaluation.path or --data, and a run's held-out rows.
EVALUATION, VALIDATION = 'evaluation', 'validation'


@dataclasses.dataclass(frozen=True)
class PromptExamples:
  """The examples of one prompt (template) of a task.

  Attributes:
    group: the group of an embedded task, or VALIDATION or EVALUATION.
    task: the name of a dataset or of an embedded task.
    name: the prompt's name; '' if its rows have none, or for all prompts.
    examples: examples with an `idx` that is the same in the task's other
      prompts.
  """

  group: str
  task: str
  name: str
  examples: tuple[Example, ...]

  @property
  def templates(self) -> str:
    """One of `SPLITS` for embedded tasks, else ''."""
    return '' if self.group in (VALIDATION, EVALUATION) else self.name


def training_prompts(
  config: ConfigDict, sources: TrainingData
) -> list[PromptExamples]:
  """Prompts of held-out examples that are ranked before and after training.

  A prompt of embedded tasks is named by its templates' split, 'seen' (in
  training) or 'held_out'. The choices of another source's template are the
  targets of its training rows. Where nothing is ranked a prompt has one
  example, so that a wrong setting is refused all the same.
  """
  e = config.evaluation
  # A hundred of each embedded prompt take a second to make and to tokenize.
  max_examples = e.max_examples if e.before or e.after else 1
  if READERS.lookup(config.data.source).evaluates_tasks:
    ranked_prompts = _embedded_prompts(config, max_examples)
  else:
    ranked = with_closed_choices(sources.rows, examples_of(sources.held_out))
    ranked_prompts = _by_task(VALIDATION, ranked, max_examples)
  if e.path:
    rows = jsonl_rows.read(e.path, ranked=True)
    for note in rows.notes(e.path):
      print(note, file=sys.stderr)
    ranked_prompts += _by_task(EVALUATION, rows, max_examples)
  return ranked_prompts


def validation_rows(
  config: ConfigDict, sources: TrainingData, collator: Collator
) -> list:
  """The tokenized held-out examples of the validation loss."""
  e = config.evaluation
  return sources.validation(collator, e.max_batches * e.batch_size)


def loss_rows(
  config: ConfigDict, sources: TrainingData, max_examples: int
) -> list[Example]:
  """The held-out examples whose loss is measured after training.

  Those of embedded tasks have no part in the validation loss, by which rates
  and checkpoints may have been chosen. Other sources have no more than those.

  Args:
    max_examples: of each embedded task.
  """
  if not READERS.lookup(config.data.source).evaluates_tasks:
    return examples_of(sources.held_out)
  names = tasks.task_names(config.data.tasks)
  return tasks.examples(
    names,
    max_examples * len(names),
    seed=config.seed,
    split='held_out',
    start=tasks.VALIDATION_EXAMPLES * len(names),
  )


def examples_of(held_out: Sequence) -> list[Example]:
  """The rows that are `Example`s; texts and conversations are tokenized."""
  return [e for e in held_out if isinstance(e, Example)]


def _embedded_prompts(
  config: ConfigDict, max_examples: int
) -> list[PromptExamples]:
  return [
    PromptExamples(
      tasks.TASKS[name].group,
      name,
      split,
      tuple(
        tasks.examples(
          (name,),
          max_examples,
          seed=config.seed,
          split='held_out',
          templates=templates,
          start=tasks.VALIDATION_EXAMPLES,
        )
      ),
    )
    for name in tasks.task_names(config.evaluation.tasks)
    for split, templates in zip(SPLITS, ('train', 'held_out'), strict=True)
  ]


def _by_task(
  group: str, rows: Iterable[Example], max_examples: int
) -> list[PromptExamples]:
  """One `PromptExamples` per task, of all its prompts."""
  by_task = collections.defaultdict(list)
  for row in rows:
    by_task[row.task].append(row)
  return [
    PromptExamples(
      group, task, '', tuple(evenly_spaced(task_rows, max_examples))
    )
    for task, task_rows in sorted(by_task.items())
  ]


def prompts(
  group: str, rows: Iterable[Example], max_examples: int
) -> list[PromptExamples]:
  """One `PromptExamples` per prompt, with equal `idx` in a task's prompts.

  Evenly spaced examples of a task are selected; a prompt that lacks some of
  them has fewer examples. Rows without an `idx` are numbered in their prompt.

  Args:
    max_examples: the maximum number of examples of a prompt.
  """
  by_task = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    prompt_rows = by_task[row.task][row.template]
    prompt_rows.append(_with_idx(row, len(prompt_rows)))
  result = []
  for task, by_name in sorted(by_task.items()):
    indices = sorted({e.idx for e in sum(by_name.values(), [])})
    selected = set(evenly_spaced(indices, max_examples))
    for name, prompt_rows in sorted(by_name.items()):
      examples = tuple(e for e in prompt_rows if e.idx in selected)
      if examples:
        result.append(PromptExamples(group, task, name, examples))
  return result


def prompts_with_choices(
  config: ConfigDict, sources: TrainingData
) -> list[PromptExamples]:
  """Prompts of a run's held-out rows that have choices.

  Rows of config.evaluation.path are not among them: training ranks those, and
  `moepeft.evaluate --data` evaluates them as other data. Embedded tasks have
  two prompts: templates that were seen in training, and held-out templates.
  """
  e = config.evaluation
  if READERS.lookup(config.data.source).evaluates_tasks:
    return _embedded_prompts(config, e.max_examples)
  rows = with_closed_choices(sources.rows, examples_of(sources.held_out))
  return prompts(VALIDATION, rows, e.max_examples)


def whole_tasks(
  rows: Iterable[Example], max_examples: int
) -> list[PromptExamples]:
  """One `PromptExamples` per task, of all its prompts.

  Rows without an `idx` are numbered in their task.

  Args:
    max_examples: the maximum number of examples of a task.
  """
  return [
    dataclasses.replace(
      prompt,
      examples=tuple(_with_idx(e, i) for i, e in enumerate(prompt.examples)),
    )
    for prompt in _by_task(VALIDATION, rows, max_examples)
  ]


def _with_idx(row: Example, index: int) -> Example:
  """Sets the `idx` of a row without one."""
  return row if row.idx >= 0 else dataclasses.replace(row, idx=index)


def digest(rows: Sequence[Example]) -> str | None:
  """The first 12 hexadecimal digits of the SHA-256 of all fields of the rows.

  None without rows.
  """
  if not rows:
    return None
  sha256 = hashlib.sha256()
  for e in rows:
    row = (e.task, e.template, e.idx, e.inputs, e.targets, e.choices, e.label)
    sha256.update(json.dumps(row).encode() + b'\n')
    if e.embedding is not None:
      sha256.update(e.embedding.tobytes())
  return sha256.hexdigest()[:12]


def with_closed_choices(
  train: Sequence[Example], validation: Sequence[Example]
) -> list[Example]:
  """Adds choices to the validation rows of templates with few answers.

  The choices of a template are its targets in the training rows. Rows of other
  templates, or whose target is not among the choices, are left out.
  """
  answers = collections.defaultdict(set)
  for e in train:
    answers[e.task, e.template].add(e.targets)
  ranked = []
  for e in validation:
    choices = tuple(sorted(answers[e.task, e.template]))
    if 2 <= len(choices) <= _MAX_CHOICES and e.targets in choices:
      label = choices.index(e.targets)
      ranked.append(dataclasses.replace(e, choices=choices, label=label))
  return ranked
