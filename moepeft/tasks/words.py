# SPDX-License-Identifier: Apache-2.0
"""Families of a few words each: short enough to learn a vocabulary from."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.family import Family, Instance, Template
from moepeft.tasks.lexicon import (
  BLAME,
  CATEGORIES,
  KINDS,
  NAMES,
  NOUNS,
  PRAISE,
  a,
)


def draw_kind(dice: Dice) -> Instance:
  """72 nouns x 20 choices of wrong kinds, of which the noun alone counts."""
  kind = dice.pick(KINDS)
  others = dice.some([k for k in KINDS if k != kind], 3)
  number = str(dice.between(10, 99))
  noun = dice.pick(CATEGORIES[kind])
  fields = {'noun': noun, 'one': a(noun), 'number': number}
  return Instance(fields, kind, tuple(others))


KIND = Family(
  'kind',
  'A',
  draw_kind,
  (
    Template('kind', '{noun}: kind? ({number})'),
    Template('what', '{number}. What is {one}?'),
    Template('is', 'item {number}: {one} is a kind of'),
    Template('list', '{number} {noun}. kind:'),
  ),
)


def draw_opinion(dice: Dice) -> Instance:
  """16 words x 90 numbers = 1,440; the number keeps instances apart."""
  good = dice.coin()
  number = str(dice.between(10, 99))
  fields = {'word': dice.pick(PRAISE if good else BLAME), 'number': number}
  answers = ('good', 'bad') if good else ('bad', 'good')
  return Instance(fields, answers[0], answers[1:])


OPINION = Family(
  'opinion',
  'A',
  draw_opinion,
  (
    Template('or', '{word}: good or bad? ({number})'),
    Template('means', '{number}. {word} means'),
    Template('call', 'item {number}: it was {word}. So?'),
    Template('list', '{number} {word}. tone:'),
  ),
)


def draw_recall(dice: Dice) -> Instance:
  """One to three pairs: up to 12,144 triples of names x 357,840 of nouns.

  With one pair the answer is only read off, which is where looking up begins.
  """
  count = dice.between(1, 3)
  names, things = dice.some(NAMES, count), dice.some(NOUNS, count + 1)
  pairs = ', '.join(
    f'{name} {thing}' for name, thing in zip(names, things, strict=False)
  )
  asked = dice.below(count)
  answer = things.pop(asked)
  fields = {'pairs': pairs, 'name': names[asked]}
  return Instance(fields, answer, tuple(things[: max(count - 1, 1)]))


RECALL = Family(
  'recall',
  'A',
  draw_recall,
  (
    Template('ask', '{pairs}. {name}?'),
    Template('has', '{pairs}. {name} has'),
    Template('first', '{name}? {pairs}.'),
    Template('of', '{pairs}. What of {name}?'),
  ),
)
