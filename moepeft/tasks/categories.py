# SPDX-License-Identifier: Apache-2.0
"""Tasks about the categories of nouns: six categories of 12 nouns each."""

from moepeft.tasks.lexicon import (
  ADJECTIVES,
  CATEGORIES,
  CATEGORY_NAMES,
  NAMES,
  with_article,
)
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template

_TRUE_FALSE = (('Yes', 'True'), ('No', 'False'))

_VERBS = tuple(
  'bought found drew lost chose spotted wanted described painted '
  'borrowed'.split()
)
_REQUESTS = (
  'asks about',
  'wonders about',
  'needs help with',
  'worries about',
  'wants advice on',
  'knows little of',
)
_EXPERTS = {
  'animal': 'vet',
  'fruit': 'grocer',
  'tool': 'builder',
  'garment': 'tailor',
  'vehicle': 'driver',
  'instrument': 'musician',
}


def _with_other_categories(
  rng: StableRandom, kind: str, count: int
) -> list[str]:
  """Returns `kind` and `count` other categories."""
  return [
    kind,
    *rng.sample(
      [candidate for candidate in CATEGORY_NAMES if candidate != kind], count
    ),
  ]


def draw_topic(rng: StableRandom) -> Instance:
  """Instances: 24 names x 10 verbs x 8 adjectives x 72 nouns = 138,240."""
  kinds = _with_other_categories(rng, rng.choice(CATEGORY_NAMES), 3)
  noun_phrase = with_article(
    f'{rng.choice(ADJECTIVES)} {rng.choice(CATEGORIES[kinds[0]])}'
  )
  text = f'{rng.choice(NAMES)} {rng.choice(_VERBS)} {noun_phrase}.'
  topics = [f'{kind}s' for kind in kinds]
  return Instance({'text': text}, topics[0], tuple(topics[1:]))


TOPIC = Task(
  'topic',
  'A',
  draw_topic,
  (
    Template('about', '{text} What is this text about?'),
    Template('options', '{text} Choose a topic: {options}.'),
    Template('sort', 'Sort this sentence by its topic. {text}'),
    Template('label', '{text} Topic:'),
    Template('kind', 'What kind of thing is in this text? {text}'),
    Template('fits', 'Which topic fits? {text}'),
  ),
)


def draw_membership(rng: StableRandom) -> Instance:
  """Instances: 4,320 pairs of nouns x 6 categories in question = 25,920."""
  kind = rng.choice(CATEGORY_NAMES)
  yes = rng.random_bool()
  kinds = _with_other_categories(rng, kind, 2)
  kinds = rng.shuffled(kinds[:2] if yes else kinds[1:])
  items = ', '.join(rng.choice(CATEGORIES[k]) for k in kinds)
  answers = ('Yes', 'No') if yes else ('No', 'Yes')
  return Instance(
    {'items': items, 'kind': kind, 'a_kind': with_article(kind)},
    answers[0],
    answers[1:],
  )


MEMBERSHIP = Task(
  'membership',
  'A',
  draw_membership,
  (
    Template('any', 'List: {items}. Is there {a_kind} in the list?'),
    Template('one_of', 'Is one of these {a_kind}? {items}'),
    Template('claim', '{items}. Claim: this names {a_kind}.', _TRUE_FALSE),
    Template('options', '{items}. Is any of them {a_kind}? ({options})'),
    Template('say', 'Does the list "{items}" have {a_kind}?'),
    Template(
      'true', 'True or false: the list "{items}" has {a_kind}.', _TRUE_FALSE
    ),
  ),
)


def draw_odd_one_out(rng: StableRandom) -> Instance:
  """Instances: 30 pairs of categories x 4 positions x 1,320 x 12 = 1.9e6."""
  kind, odd_kind = rng.sample(CATEGORY_NAMES, 2)
  odd = rng.choice(CATEGORIES[odd_kind])
  same = rng.sample(CATEGORIES[kind], 3)
  items = rng.shuffled([odd, *same])
  return Instance({'items': ', '.join(items)}, odd, tuple(same))


ODD_ONE_OUT = Task(
  'odd_one_out',
  'A',
  draw_odd_one_out,
  (
    Template('odd', 'Which is the odd one out? {items}'),
    Template('belong', '{items}. Which word does not belong?'),
    Template('remove', 'Remove one word so that the rest match: {items}.'),
    Template('alike', 'Three of these are alike: {items}. Which is not?'),
    Template('different', 'Words: {items}. Find the different one.'),
  ),
)


def draw_profession(rng: StableRandom) -> Instance:
  """Instances: 24 names x 6 requests x 8 adjectives x 72 nouns = 82,944."""
  kinds = _with_other_categories(rng, rng.choice(CATEGORY_NAMES), 3)
  name = rng.choice(NAMES)
  noun_phrase = with_article(
    f'{rng.choice(ADJECTIVES)} {rng.choice(CATEGORIES[kinds[0]])}'
  )
  text = f'{name} {rng.choice(_REQUESTS)} {noun_phrase}.'
  experts = [_EXPERTS[kind] for kind in kinds]
  return Instance({'text': text, 'name': name}, experts[0], tuple(experts[1:]))


PROFESSION = Task(
  'profession',
  'B',
  draw_profession,
  (
    Template('whom', '{text} Whom should {name} ask?'),
    Template('options', '{text} Pick an expert: {options}.'),
    Template('expert', 'Find the right expert. {text}'),
    Template('talk', '{text} {name} should talk to the'),
    Template('help', 'Who can help {name}? {text}'),
    Template('call', '{text} Call one of these: {options}.'),
  ),
)


def draw_tidy(rng: StableRandom) -> Instance:
  """Instances: 71,280 lists of one category, 1.9e6 of three nouns and one."""
  kind, odd_kind = rng.sample(CATEGORY_NAMES, 2)
  tidy = rng.random_bool()
  items = rng.sample(CATEGORIES[kind], 4)
  if not tidy:
    items[rng.randbelow(4)] = rng.choice(CATEGORIES[odd_kind])
  answers = ('tidy', 'messy') if tidy else ('messy', 'tidy')
  return Instance({'items': ', '.join(items)}, answers[0], answers[1:])


TIDY = Task(
  'tidy',
  'C',
  draw_tidy,
  (
    Template('is', 'A toy box holds: {items}. Is the box tidy or messy?'),
    Template('shelf', 'Shelf: {items}. The shelf is'),
    Template('options', 'Judge this drawer: {items}. Options: {options}.'),
    Template('state', 'What state is the box in? It holds: {items}.'),
    Template('rate', 'Tidy or messy? On the shelf: {items}.'),
  ),
)
