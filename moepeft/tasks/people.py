# SPDX-License-Identifier: Apache-2.0
"""Tasks about owners, phone numbers and ranks of people, with 24 names."""

from moepeft.tasks.lexicon import NAMES, NOUNS, with_article
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template

_RANKS = ('first', 'second', 'third', 'last')
_MEDALS = ('gold', 'silver', 'bronze')


def _ownership_facts(rng: StableRandom) -> tuple[list[str], list[str], str]:
  """Returns three names, a noun for each, and a sentence of who has what."""
  names = rng.sample(NAMES, 3)
  nouns = rng.sample(NOUNS, 3)
  has = [f'{names[i]} has {with_article(nouns[i])}' for i in range(3)]
  return names, nouns, f'{has[0]}, {has[1]} and {has[2]}.'


def draw_lookup(rng: StableRandom) -> Instance:
  """Instances: 12,144 triples of names x 357,840 of nouns x 3 = 1e10."""
  names, nouns, facts = _ownership_facts(rng)
  index = rng.randbelow(3)
  answer = nouns.pop(index)
  return Instance({'facts': facts, 'name': names[index]}, answer, tuple(nouns))


LOOKUP = Task(
  'lookup',
  'A',
  draw_lookup,
  (
    Template('what', '{facts} What does {name} have?'),
    Template('question', 'Question: what does {name} have? {facts}'),
    Template('thing', '{facts} The thing that {name} has is the'),
    Template('options', '{facts} {name} has ({options})'),
    Template('find', 'Find what belongs to {name}. {facts}'),
    Template('read', 'Read: {facts} Now say what {name} has.'),
  ),
)


def draw_directory(rng: StableRandom) -> Instance:
  """Instances: 12,144 triples of names x 7e11 of numbers x 3 questions."""
  names = rng.sample(NAMES, 3)
  numbers: list[str] = []
  while len(numbers) < 3:
    number = str(rng.randint(1000, 9999))
    if number not in numbers:
      numbers.append(number)
  lines = ', '.join(f'{names[i]} {numbers[i]}' for i in range(3))
  index = rng.randbelow(3)
  answer = numbers.pop(index)
  return Instance(
    {'lines': lines, 'name': names[index]}, answer, tuple(numbers)
  )


DIRECTORY = Task(
  'directory',
  'C',
  draw_directory,
  (
    Template('what', "Phone list: {lines}. What is {name}'s number?"),
    Template('call', 'To call {name}, dial which number? {lines}'),
    Template('dial', '{lines}. For {name} dial'),
    Template('options', 'Numbers: {lines}. Which is for {name}? {options}'),
    Template('find', 'Find the number of {name} in this list: {lines}.'),
  ),
)


def draw_owner(rng: StableRandom) -> Instance:
  """Instances: 12,144 triples of names x 357,840 of nouns x 3 = 1e10."""
  names, nouns, facts = _ownership_facts(rng)
  index = rng.randbelow(3)
  answer = names.pop(index)
  return Instance({'facts': facts, 'thing': nouns[index]}, answer, tuple(names))


OWNER = Task(
  'owner',
  'C',
  draw_owner,
  (
    Template('whose', '{facts} Whose is the {thing}?'),
    Template('belongs', '{facts} The {thing} belongs to'),
    Template('options', 'Owner of the {thing} ({options})? {facts}'),
    Template('owner', 'Name the owner of the {thing}. {facts}'),
    Template('who', '{facts} Who has the {thing}?'),
  ),
)


def draw_order(rng: StableRandom) -> Instance:
  """Instances: 255,024 queues of four x 4 ranks = 1.0 million."""
  names = rng.sample(NAMES, 4)
  queue = ', '.join(names)
  index = rng.randbelow(4)
  answer = names.pop(index)
  return Instance({'queue': queue, 'rank': _RANKS[index]}, answer, tuple(names))


ORDER = Task(
  'order',
  'C',
  draw_order,
  (
    Template('who', 'The queue is: {queue}. Who is {rank}?'),
    Template('name', 'Give the {rank} name. {queue}'),
    Template('row', '{queue} stand in a row. The {rank} one is'),
    Template('options', 'Queue: {queue}. Who is {rank}? Pick: {options}.'),
    Template('line', 'In the line {queue}, who comes {rank}?'),
  ),
)


def draw_medal(rng: StableRandom) -> Instance:
  """Instances: 12,144 orders of three runners x 3 questions = 36,432."""
  names = rng.sample(NAMES, 3)
  index = rng.randbelow(3)
  medals = list(_MEDALS)
  answer = medals.pop(index)
  return Instance(
    {'finish': ', '.join(names), 'name': names[index]}, answer, tuple(medals)
  )


MEDAL = Task(
  'medal',
  'C',
  draw_medal,
  (
    Template('which', 'The race ended: {finish}. Which medal did {name} win?'),
    Template('gets', 'Finish: {finish}. {name} gets'),
    Template('options', 'In order: {finish}. Medal for {name} ({options}):'),
    Template('hand', 'Hand {name} the right medal. The order was {finish}.'),
    Template('colour', "Results: {finish}. What colour is {name}'s medal?"),
  ),
)
