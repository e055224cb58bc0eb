# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks: a generated multi-task dataset, similar to P3.

Group A is for pretraining a small base model, group B for adapting it with a
method, and group C is for evaluation only. Each task of B needs a skill of A
with new instructions and new labels, so the base model starts near chance and
has to learn the mapping to labels rather than the skill:

    task of B   mapping                          tasks of A with its skill
    storage     category -> storage place        kind
    profession  category -> expert               kind, topic
    stars       positive, negative -> five, one  opinion
    verdict     positive, negative -> keep,      opinion, sentiment
                return

The last templates of a task and a tenth of its instances are held out from
training (`Task.split_of`). To add a task, write a draw function and templates
in one file and a line in `TASKS`, or call `TASKS.register` in your own module.
"""

import zlib

from moepeft.core.ranges import suggestion
from moepeft.core.registry import Registry
from moepeft.tasks.stable_random import StableRandom as StableRandom
from moepeft.tasks.task import Example as Example
from moepeft.tasks.task import Instance as Instance
from moepeft.tasks.task import Task as Task
from moepeft.tasks.task import Template as Template

TASKS = Registry(
  'task',
  'moepeft.tasks',
  {
    'kind': 'words:KIND',
    'opinion': 'words:OPINION',
    'recall': 'words:RECALL',
    'topic': 'categories:TOPIC',
    'membership': 'categories:MEMBERSHIP',
    'odd_one_out': 'categories:ODD_ONE_OUT',
    'sentiment': 'reviews:SENTIMENT',
    'lookup': 'people:LOOKUP',
    'storage': 'words:STORAGE',
    'profession': 'categories:PROFESSION',
    'stars': 'words:STARS',
    'verdict': 'reviews:VERDICT',
    'tidy': 'categories:TIDY',
    'directory': 'people:DIRECTORY',
    'order': 'people:ORDER',
    'owner': 'people:OWNER',
    'medal': 'people:MEDAL',
    'comparison': 'amounts:COMPARISON',
    'result': 'amounts:RESULT',
    'entailment': 'statements:ENTAILMENT',
    'paraphrase': 'statements:PARAPHRASE',
    'negation': 'statements:NEGATION',
    'coreference': 'meaning:COREFERENCE',
    'word_sense': 'meaning:WORD_SENSE',
    'completion': 'meaning:COMPLETION',
    'analogy': 'meaning:ANALOGY',
    'arithmetic': 'amounts:ARITHMETIC',
    'counting': 'amounts:COUNTING',
  },
)
GROUPS = ('A', 'B', 'C')
# The first held-out examples of each task are for the validation loss, by which
# rates and checkpoints are chosen; evaluations have those after them.
VALIDATION_EXAMPLES = 32


def task_names(text: str) -> tuple[str, ...]:
  """Returns the names of the tasks that a selection of groups and tasks has.

  Args:
    text: groups and tasks, separated by commas; the commas between groups are
      optional: 'A', 'AB', 'topic,owner', 'B,topic'.

  Raises:
    ValueError: a group or task does not exist.
  """
  names = []
  for part in text.split(','):
    part = part.strip()
    if part in TASKS:
      names.append(part)
    elif part and set(part) <= set(GROUPS):
      names += [name for name, task in TASKS.items() if task.group in part]
    else:
      raise ValueError(
        f'there is no task or group {part!r}; groups are {", ".join(GROUPS)}, '
        f'and tasks {", ".join(TASKS)}{suggestion(part, TASKS)}'
      )
  return tuple(names)


def example(
  names: tuple[str, ...],
  index: int,
  *,
  seed: int,
  split: str = 'train',
  templates: str = 'train',
) -> Example:
  """Returns example `index` of an infinite stream, as a pure function.

  The tasks alternate in the order of `names`. The n-th example of a task
  depends on the seed, split and templates but not on the other tasks.

  Args:
    names: task names, from `task_names`.
    index: the index in the stream, at least 0.
    seed: the seed of the stream, at least 0.
    split: the split of the instances, 'train' or 'held_out'.
    templates: 'train', 'held_out' or 'all'.

  Raises:
    ValueError: there are no names, the split or templates do not exist, or the
      seed or index is negative.
  """
  if not names:
    raise ValueError('a stream needs at least one task; see task_names')
  if seed < 0 or index < 0:
    raise ValueError(
      f'seeds and indices count from 0; got seed {seed}, index {index}'
    )
  if split not in ('train', 'held_out'):
    raise ValueError(f'a split is train or held_out; got {split!r}')
  task_index, name_index = divmod(index, len(names))
  task = TASKS[names[name_index]]
  rng = StableRandom(seed, zlib.crc32(task.name.encode()), task_index)
  instance = task.draw(rng)
  while task.split_of(instance) != split:
    instance = task.draw(rng)
  template = rng.choice(task.templates_of(templates))
  answers = (instance.answer, *instance.distractors)
  order = rng.shuffled(range(len(answers)))
  inputs, choices = template.render(instance, [answers[i] for i in order])
  label = order.index(0)
  return Example(
    task.name, template.name, index, inputs, choices[label], choices, label
  )


def examples(
  names: tuple[str, ...],
  count: int,
  *,
  seed: int,
  split: str = 'train',
  templates: str = 'train',
  start: int = 0,
) -> list[Example]:
  """Returns `count` examples of the stream of `example`, from `start` on."""
  return [
    example(names, index, seed=seed, split=split, templates=templates)
    for index in range(start, start + count)
  ]
