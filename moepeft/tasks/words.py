# SPDX-License-Identifier: Apache-2.0
"""Families of a few words each: short enough to learn a vocabulary from."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.lexicon import (
  CATEGORIES,
  CATEGORY_NAMES,
  NAMES,
  NEGATIVE_WORDS,
  NOUNS,
  POSITIVE_WORDS,
  with_article,
)
from moepeft.tasks.task import Instance, Task, Template


def draw_kind(dice: Dice) -> Instance:
  """72 nouns x 20 choices of wrong kinds, of which the noun alone counts."""
  kind = dice.pick(CATEGORY_NAMES)
  wrong = dice.sample([k for k in CATEGORY_NAMES if k != kind], 3)
  number = str(dice.between(10, 99))
  noun = dice.pick(CATEGORIES[kind])
  fields = {'noun': noun, 'one': with_article(noun), 'number': number}
  return Instance(fields, kind, tuple(wrong))


KIND = Task(
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
  fields = {
    'word': dice.pick(POSITIVE_WORDS if good else NEGATIVE_WORDS),
    'number': number,
  }
  answers = ('good', 'bad') if good else ('bad', 'good')
  return Instance(fields, answers[0], answers[1:])


OPINION = Task(
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
  names, nouns = dice.sample(NAMES, count), dice.sample(NOUNS, count + 1)
  pairs = ', '.join(
    f'{name} {noun}' for name, noun in zip(names, nouns, strict=False)
  )
  index = dice.below(count)
  answer = nouns.pop(index)
  fields = {'pairs': pairs, 'name': names[index]}
  return Instance(fields, answer, tuple(nouns[: max(count - 1, 1)]))


RECALL = Task(
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


_HOMES = dict(
  zip(
    CATEGORY_NAMES,
    ('barn', 'bowl', 'shed', 'wardrobe', 'garage', 'orchestra'),
    strict=True,
  )
)


def draw_storage(dice: Dice) -> Instance:
  """72 nouns x 90 numbers = 6,480; the number keeps instances apart."""
  kind = dice.pick(CATEGORY_NAMES)
  noun = dice.pick(CATEGORIES[kind])
  number = str(dice.between(10, 99))
  wrong = dice.sample([h for h in _HOMES.values() if h != _HOMES[kind]], 3)
  fields = {'noun': noun, 'one': with_article(noun), 'number': number}
  return Instance(fields, _HOMES[kind], tuple(wrong))


STORAGE = Task(
  'storage',
  'B',
  draw_storage,
  (
    Template('where', '{number}. Where does {one} belong?'),
    Template('put', 'Put the {noun} ({number}) in its'),
    Template('label', '{number} {noun}. place:'),
    Template('look', 'To find {one}, number {number}, look in the'),
    Template('keep', 'Where do we keep {one}? ({number})'),
  ),
)


def draw_stars(dice: Dice) -> Instance:
  """112 pairs of words of one colour x 90 numbers = 10,080."""
  good = dice.coin()
  first, two = dice.sample(POSITIVE_WORDS if good else NEGATIVE_WORDS, 2)
  fields = {'one': first, 'two': two, 'number': str(dice.between(10, 99))}
  answers = ('five', 'one') if good else ('one', 'five')
  return Instance(fields, answers[0], answers[1:])


STARS = Task(
  'stars',
  'B',
  draw_stars,
  (
    Template('how', 'Guest {number}: {one}, {two}. How many stars?'),
    Template('give', '{number}. It was {one} and {two}. Stars:'),
    Template('count', 'Stars from guest {number}, who said {one} and {two}:'),
    Template('rate', '{one}, {two} ({number}). Rate it.'),
    Template('ask', 'How many stars? Guest {number} wrote: {one}, {two}.'),
  ),
)
