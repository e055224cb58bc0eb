# SPDX-License-Identifier: Apache-2.0
"""Families about numbers: comparing, adding and counting."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.lexicon import CATEGORIES, CATEGORY_NAMES, NAMES, NOUNS
from moepeft.tasks.task import Instance, Task, Template

_MEASURES = (
  ('is {} years old', 'Who is older?'),
  ('scored {} points', 'Who got more points?'),
  ('has {} coins', 'Who has more coins?'),
)
_GOODS = tuple(
  'coins cards books stamps shells apples eggs pens beads cups keys '
  'balls'.split()
)
_CHANGES = (
  ('buys {} more', 1),
  ('finds {} more', 1),
  ('loses {}', -1),
  ('gives away {}', -1),
)
_COUNTS = ('one', 'two', 'three', 'four')
_REST = {
  kind: tuple(noun for noun in NOUNS if noun not in nouns)
  for kind, nouns in CATEGORIES.items()
}


def _two_numbers(dice: Dice) -> tuple[int, int]:
  """Two numbers of two digits that differ in their tens."""
  first, second = dice.sample(range(1, 10), 2)
  return 10 * first + dice.below(10), 10 * second + dice.below(10)


def draw_comparison(dice: Dice) -> Instance:
  """552 pairs of names x 7,200 of numbers x 3 measures = 12 million."""
  names = dice.sample(NAMES, 2)
  numbers = _two_numbers(dice)
  claim, question = dice.pick(_MEASURES)
  first_claim, second_claim = (claim.format(n) for n in numbers)
  facts = f'{names[0]} {first_claim} and {names[1]} {second_claim}.'
  if numbers[0] < numbers[1]:
    names.reverse()
  return Instance(
    {'facts': facts, 'question': question},
    names[0],
    (names[1],),
  )


COMPARISON = Task(
  'comparison',
  'C',
  draw_comparison,
  (
    Template('after', '{facts} {question}'),
    Template('before', '{question} {facts}'),
    Template('labels', 'Facts: {facts} Question: {question} Answer:'),
    Template('options', '{facts} {question} Choose: {options}.'),
    Template('compare', 'Compare and answer. {facts} {question}'),
  ),
)


def draw_result(dice: Dice) -> Instance:
  """552 pairs of names x 7,200 of numbers x 2 questions = 7.9 million."""
  names = dice.sample(NAMES, 2)
  numbers = _two_numbers(dice)
  index = dice.below(2)
  win = numbers[index] > numbers[1 - index]
  facts = (
    f'{names[0]} scored {numbers[0]} points'
    f' and {names[1]} scored {numbers[1]} points.'
  )
  answers = ('win', 'lose') if win else ('lose', 'win')
  return Instance(
    {'facts': facts, 'name': names[index]}, answers[0], answers[1:]
  )


RESULT = Task(
  'result',
  'C',
  draw_result,
  (
    Template('did', '{facts} Did {name} win or lose?'),
    Template('how', 'How did it end for {name}? {facts}'),
    Template('options', 'Outcome for {name} ({options})? {facts}'),
    Template('tell', 'Tell {name} the result. {facts}'),
    Template('report', 'Match report: {facts} Result for {name}:'),
  ),
)


def draw_arithmetic(dice: Dice) -> Instance:
  """24 names x 12 goods x 60 x 11 numbers x 4 changes = 760,320."""
  name, goods = dice.pick(NAMES), dice.pick(_GOODS)
  start, step = dice.between(20, 79), dice.between(2, 12)
  change, sign = dice.pick(_CHANGES)
  total = start + sign * step
  below = dice.below(4)  # so that the answer is at each rank equally often
  wrong = [total - d for d in dice.sample((1, 2, 5), min(below, 3))]
  wrong += [total + d for d in dice.sample((1, 2, 5), 3 - below)]
  story = f'{name} has {start} {goods} and {change.format(step)}.'
  return Instance(
    {'story': story, 'name': name, 'goods': goods},
    str(total),
    tuple(str(n) for n in wrong),
  )


ARITHMETIC = Task(
  'arithmetic',
  'C',
  draw_arithmetic,
  (
    Template('how_many', '{story} How many {goods} does {name} have now?'),
    Template('now', '{story} The number of {goods} is now'),
    Template('options', 'Work it out. {story} Now {name} has ({options})'),
    Template('count', "Count {name}'s {goods}. {story}"),
  ),
)


def draw_counting(dice: Dice) -> Instance:
  """Lists of five nouns, one to four of the kind that is asked: over 1e9."""
  kind = dice.pick(CATEGORY_NAMES)
  count = dice.between(1, 4)
  items = dice.sample(CATEGORIES[kind], count) + dice.sample(
    _REST[kind], 5 - count
  )
  answer = _COUNTS[count - 1]
  return Instance(
    {'items': ', '.join(dice.shuffled(items)), 'kind': kind},
    answer,
    tuple(word for word in _COUNTS if word != answer),
  )


COUNTING = Task(
  'counting',
  'C',
  draw_counting,
  (
    Template('how_many', 'How many of these are {kind}s? {items}'),
    Template('list', 'List: {items}. Count the {kind}s.'),
    Template('options', '{items}. Number of {kind}s ({options}):'),
    Template('in_all', 'Find each {kind}: {items}. How many are there?'),
  ),
)
