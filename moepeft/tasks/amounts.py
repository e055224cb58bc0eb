# SPDX-License-Identifier: Apache-2.0
"""Tasks about numbers: comparison, arithmetic and counting."""

from moepeft.tasks.lexicon import CATEGORIES, CATEGORY_NAMES, NAMES, NOUNS
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template

_MEASURES = (
  ('is {} years old', 'Who is older?'),
  ('scored {} points', 'Who got more points?'),
  ('has {} coins', 'Who has more coins?'),
)
_ITEMS = tuple(
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
_OTHER_NOUNS = {
  kind: tuple(noun for noun in NOUNS if noun not in nouns)
  for kind, nouns in CATEGORIES.items()
}


def _two_numbers(rng: StableRandom) -> tuple[int, int]:
  """Two numbers of two digits with different tens."""
  first, second = rng.sample(range(1, 10), 2)
  return 10 * first + rng.randbelow(10), 10 * second + rng.randbelow(10)


def draw_comparison(rng: StableRandom) -> Instance:
  """Instances: 552 pairs of names x 7,200 of numbers x 3 measures = 12e6."""
  names = rng.sample(NAMES, 2)
  numbers = _two_numbers(rng)
  claim, question = rng.choice(_MEASURES)
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


def draw_result(rng: StableRandom) -> Instance:
  """Instances: 552 pairs of names x 7,200 of numbers x 2 questions = 7.9e6."""
  names = rng.sample(NAMES, 2)
  numbers = _two_numbers(rng)
  index = rng.randbelow(2)
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


def draw_arithmetic(rng: StableRandom) -> Instance:
  """Instances: 24 names x 12 items x 60 x 11 numbers x 4 changes = 760,320."""
  name, items = rng.choice(NAMES), rng.choice(_ITEMS)
  start, step = rng.randint(20, 79), rng.randint(2, 12)
  change, sign = rng.choice(_CHANGES)
  total = start + sign * step
  # The answer is equally often the smallest, second, ... of the choices.
  smaller_count = rng.randbelow(4)
  wrong = [total - d for d in rng.sample((1, 2, 5), min(smaller_count, 3))]
  wrong += [total + d for d in rng.sample((1, 2, 5), 3 - smaller_count)]
  story = f'{name} has {start} {items} and {change.format(step)}.'
  return Instance(
    {'story': story, 'name': name, 'goods': items},
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


def draw_counting(rng: StableRandom) -> Instance:
  """Instances: over 1e9 lists of 5 nouns, 1 to 4 of the category."""
  kind = rng.choice(CATEGORY_NAMES)
  count = rng.randint(1, 4)
  items = rng.sample(CATEGORIES[kind], count) + rng.sample(
    _OTHER_NOUNS[kind], 5 - count
  )
  answer = _COUNTS[count - 1]
  return Instance(
    {'items': ', '.join(rng.shuffled(items)), 'kind': kind},
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
