# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks: a generated multi-task set in the spirit of P3.

Group A pretrains a small base, methods adapt to group B, and nothing is ever
trained on group C. A task of B asks for something that A taught, in new
instructions and with labels that A never uses, so a base begins near chance
and has to learn the mapping rather than the skill:

    B           asks for                          after A taught
    storage     category -> where it is kept      kind
    profession  category -> who knows about it    kind, topic
    stars       praise or blame -> five, one      opinion
    verdict     praise or blame -> keep, return   opinion, sentiment

Templates marked held out word a task in a way that training never sees; a
tenth of each task's instances is held out too (`Task.split_of`). A new task is
a draw and its templates in one file and a line in `TASKS`, or a module of a
user's that calls `TASKS.register`.
"""

import zlib

from moepeft.core.ranges import suggestion
from moepeft.core.registry import Registry
from moepeft.tasks.dice import Dice as Dice
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


def task_names(text: str) -> tuple[str, ...]:
  """The names of the tasks of some groups, or a choice of tasks.

  Args:
    text: groups and tasks with commas between them; groups may be written
      together: 'A', 'AB', 'topic,owner', 'B,topic'.

  Raises:
    ValueError: a group or task that does not exist.
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
  """Example `index` of an endless stream: a pure function of its arguments.

  The tasks take turns, in the order of `names`. The example of a task's n-th
  turn depends on the seed, split and templates but not on the other tasks.

  Args:
    names: of tasks, as from `task_names`.
    index: place in the stream, from 0.
    seed: names the stream, from 0.
    split: 'train' or 'held_out' instances.
    templates: 'train', 'held_out' or 'all' wordings.

  Raises:
    ValueError: no tasks, an unknown split or kind of templates, or a
      negative seed or index.
  """
  if not names:
    raise ValueError('a stream needs at least one task; see task_names')
  if seed < 0 or index < 0:
    raise ValueError(
      f'seeds and indices count from 0; got seed {seed}, index {index}'
    )
  if split not in ('train', 'held_out'):
    raise ValueError(f'a split is train or held_out; got {split!r}')
  turn, place = divmod(index, len(names))
  task = TASKS[names[place]]
  dice = Dice(seed, zlib.crc32(task.name.encode()), turn)
  instance = task.draw(dice)
  while task.split_of(instance) != split:
    instance = task.draw(dice)
  template = dice.pick(task.templates_of(templates))
  answers = (instance.answer, *instance.distractors)
  order = dice.shuffled(range(len(answers)))
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
  """Examples `start` to `start + count` of the stream of `example`."""
  return [
    example(names, index, seed=seed, split=split, templates=templates)
    for index in range(start, start + count)
  ]
