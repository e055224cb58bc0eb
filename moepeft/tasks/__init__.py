# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks: a generated multi-task set in the spirit of P3.

Group A pretrains a small base, methods adapt to group B, and nothing is ever
trained on group C. A family of B asks for something that A taught, in new
instructions and with labels that A never uses, so a base begins near chance
and has to learn the mapping rather than the skill:

    B           asks for                          after A taught
    storage     category -> where it is kept      kind
    profession  category -> who knows about it    kind, topic
    stars       praise or blame -> five, one      opinion
    verdict     praise or blame -> keep, return   opinion, sentiment

Templates marked held out word a family in a way that training never sees; a
tenth of each family's instances is held out too (`Family.split_of`). A new
family is a draw and its templates in one file, and a line in the table below.
"""

import zlib

from moepeft.core.ranges import suggestion
from moepeft.tasks import (
  amounts,
  categories,
  meaning,
  people,
  reviews,
  statements,
  words,
)
from moepeft.tasks.dice import Dice
from moepeft.tasks.family import Example, Family

_TABLE = (
  words.KIND,
  words.OPINION,
  words.RECALL,
  categories.TOPIC,
  categories.MEMBERSHIP,
  categories.ODD_ONE_OUT,
  reviews.SENTIMENT,
  people.LOOKUP,
  words.STORAGE,
  categories.PROFESSION,
  words.STARS,
  reviews.VERDICT,
  categories.TIDY,
  people.DIRECTORY,
  people.ORDER,
  people.OWNER,
  people.MEDAL,
  amounts.COMPARISON,
  amounts.RESULT,
  statements.ENTAILMENT,
  statements.PARAPHRASE,
  statements.NEGATION,
  meaning.COREFERENCE,
  meaning.WORD_SENSE,
  meaning.COMPLETION,
  meaning.ANALOGY,
  amounts.ARITHMETIC,
  amounts.COUNTING,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}
GROUPS = ('A', 'B', 'C')


def families(group: str) -> tuple[str, ...]:
  """The names of the families of some groups, or a choice of families.

  Args:
    group: groups and families with commas between them; groups may be
      written together: 'A', 'AB', 'topic,owner', 'B,topic'.

  Raises:
    ValueError: a group or family that does not exist.
  """
  names = []
  for part in group.split(','):
    part = part.strip()
    if part in FAMILIES:
      names.append(part)
    elif part and set(part) <= set(GROUPS):
      names += [f.name for f in _TABLE if f.group in part]
    else:
      raise ValueError(
        f'No task family or group {part!r}: groups are {", ".join(GROUPS)};'
        f' families are {", ".join(FAMILIES)}{suggestion(part, FAMILIES)}'
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

  The families take turns, in the order of `names`. What a family gives at its
  n-th turn depends on the seed, split and templates but not on the others.

  Args:
    names: families, as `families` gives them.
    index: place in the stream, from 0.
    seed: names the stream, from 0.
    split: 'train' or 'held_out' instances.
    templates: 'train', 'held_out' or 'all' wordings.

  Raises:
    ValueError: no families, an unknown split or kind of templates, or a
      negative seed or index.
  """
  if not names:
    raise ValueError('A stream needs at least one family; see families().')
  if seed < 0 or index < 0:
    raise ValueError(
      f'Seeds and indices count from 0; got seed {seed}, index {index}.'
    )
  if split not in ('train', 'held_out'):
    raise ValueError(f'A split is train or held_out; got {split!r}.')
  turn, place = divmod(index, len(names))
  family = FAMILIES[names[place]]
  dice = Dice(seed, zlib.crc32(family.name.encode()), turn)
  instance = family.draw(dice)
  while family.split_of(instance) != split:
    instance = family.draw(dice)
  template = dice.pick(family.templates_of(templates))
  answers = (instance.answer, *instance.distractors)
  order = dice.shuffled(range(len(answers)))
  inputs, choices = template.render(instance, [answers[i] for i in order])
  label = order.index(0)
  return Example(
    family.name, template.name, index, inputs, choices[label], choices, label
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
