# SPDX-License-Identifier: Apache-2.0
"""Families about the categories of nouns, over six kinds of 16 nouns each."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.family import Family, Instance, Template
from moepeft.tasks.lexicon import CATEGORIES, KINDS, LOOKS, NAMES, PLACES, a

TRUE_FALSE = (('Yes', 'True'), ('No', 'False'))

_DEEDS = tuple(
  'bought found drew lost chose spotted wanted described painted '
  'borrowed'.split()
)
_NEEDS = (
  'has a question about',
  'wants to learn about',
  'needs help with',
  'is worried about',
  'wants advice on',
  'knows little about',
)
_EXPERTS = {
  'animal': 'vet',
  'fruit': 'grocer',
  'tool': 'builder',
  'garment': 'tailor',
  'vehicle': 'driver',
  'instrument': 'musician',
}


def _with_others(dice: Dice, kind: str, count: int) -> list[str]:
  """`count` different kinds other than `kind`."""
  return dice.some([other for other in KINDS if other != kind], count)


def draw_topic(dice: Dice) -> Instance:
  """24 names x 10 deeds x 8 looks x 96 nouns x 12 places = 2.2 million."""
  kind = dice.pick(KINDS)
  thing = a(f'{dice.pick(LOOKS)} {dice.pick(CATEGORIES[kind])}')
  text = (
    f'{dice.pick(NAMES)} {dice.pick(_DEEDS)} {thing}'
    f' near the {dice.pick(PLACES)}.'
  )
  others = _with_others(dice, kind, 3)
  return Instance(
    {'text': text}, f'{kind}s', tuple(f'{other}s' for other in others)
  )


TOPIC = Family(
  'topic',
  'A',
  draw_topic,
  (
    Template('about', '{text} What is this text about?'),
    Template('options', 'Text: {text} Choose a topic: {options}.'),
    Template('sort', 'Sort this sentence by its topic. {text}'),
    Template('label', '{text} Topic:'),
    Template('kind', 'What kind of thing is in this sentence? {text}'),
    Template('fits', 'Which topic fits? {text} Options: {options}.'),
  ),
)


def draw_membership(dice: Dice) -> Instance:
  """Lists of three nouns of three kinds, one kind asked: 3 million."""
  kind = dice.pick(KINDS)
  yes = dice.coin()
  others = _with_others(dice, kind, 3)
  kinds = dice.shuffled([kind, *others[:2]] if yes else others)
  items = ', '.join(dice.pick(CATEGORIES[k]) for k in kinds)
  answers = ('Yes', 'No') if yes else ('No', 'Yes')
  return Instance(
    {'items': items, 'kind': kind, 'a_kind': a(kind)}, answers[0], answers[1:]
  )


MEMBERSHIP = Family(
  'membership',
  'A',
  draw_membership,
  (
    Template('any', 'List: {items}. Is there {a_kind} in the list?'),
    Template('one_of', 'Is one of these {a_kind}? {items}'),
    Template('claim', '{items}. Claim: this names {a_kind}.', TRUE_FALSE),
    Template('options', '{items}. Is any of them {a_kind}? ({options})'),
    Template('say', 'Does the list "{items}" have {a_kind}?'),
    Template(
      'true', 'True or false: the list "{items}" has {a_kind}.', TRUE_FALSE
    ),
  ),
)


def draw_odd_one_out(dice: Dice) -> Instance:
  """30 pairs of kinds x 4 places x 3,360 triples x 16 = 6.5 million."""
  kind, other = dice.some(KINDS, 2)
  odd = dice.pick(CATEGORIES[other])
  same = dice.some(CATEGORIES[kind], 3)
  items = dice.shuffled([odd, *same])
  return Instance({'items': ', '.join(items)}, odd, tuple(same))


ODD_ONE_OUT = Family(
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


def draw_profession(dice: Dice) -> Instance:
  """24 names x 6 needs x 8 looks x 96 nouns = 110,592."""
  kind = dice.pick(KINDS)
  name = dice.pick(NAMES)
  thing = a(f'{dice.pick(LOOKS)} {dice.pick(CATEGORIES[kind])}')
  text = f'{name} {dice.pick(_NEEDS)} {thing}.'
  others = _with_others(dice, kind, 3)
  return Instance(
    {'text': text, 'name': name},
    _EXPERTS[kind],
    tuple(_EXPERTS[other] for other in others),
  )


PROFESSION = Family(
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


def draw_tidy(dice: Dice) -> Instance:
  """Half one kind (262,080 lists), half three and one (8 million)."""
  kind, other = dice.some(KINDS, 2)
  tidy = dice.coin()
  items = dice.some(CATEGORIES[kind], 4)
  if not tidy:
    items[dice.below(4)] = dice.pick(CATEGORIES[other])
  answers = ('tidy', 'messy') if tidy else ('messy', 'tidy')
  return Instance({'items': ', '.join(items)}, answers[0], answers[1:])


TIDY = Family(
  'tidy',
  'B',
  draw_tidy,
  (
    Template('is', 'A toy box holds: {items}. Is the box tidy or messy?'),
    Template('shelf', 'Shelf: {items}. The shelf is'),
    Template('options', 'Judge this drawer: {items}. Options: {options}.'),
    Template('state', 'What state is the box in? It holds: {items}.'),
    Template('rate', 'Tidy or messy? On the shelf: {items}.'),
  ),
)
