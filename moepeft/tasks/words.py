# SPDX-License-Identifier: Apache-2.0
"""Tasks with inputs of a few words, which teach the vocabulary."""

from moepeft.tasks.lexicon import (
  CATEGORIES,
  CATEGORY_NAMES,
  NAMES,
  NEGATIVE_WORDS,
  NOUNS,
  POSITIVE_WORDS,
  with_article,
)
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template


def draw_kind(rng: StableRandom) -> Instance:
  """Instances: 72 nouns x 90 numbers = 6,480."""
  kind = rng.choice(CATEGORY_NAMES)
  wrong = rng.sample([k for k in CATEGORY_NAMES if k != kind], 3)
  number = str(rng.randint(10, 99))
  noun = rng.choice(CATEGORIES[kind])
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


def draw_opinion(rng: StableRandom) -> Instance:
  """Instances: 16 words x 90 numbers = 1,440."""
  good = rng.random_bool()
  number = str(rng.randint(10, 99))
  fields = {
    'word': rng.choice(POSITIVE_WORDS if good else NEGATIVE_WORDS),
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


def draw_recall(rng: StableRandom) -> Instance:
  """Instances: 1 to 3 pairs, up to 12,144 triples of names x 357,840 of nouns.

  One pair is the easiest case: the answer is its noun.
  """
  count = rng.randint(1, 3)
  names, nouns = rng.sample(NAMES, count), rng.sample(NOUNS, count + 1)
  pairs = ', '.join(
    f'{name} {noun}' for name, noun in zip(names, nouns, strict=False)
  )
  index = rng.randbelow(count)
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


_STORAGE_PLACES = dict(
  zip(
    CATEGORY_NAMES,
    ('barn', 'bowl', 'shed', 'wardrobe', 'garage', 'orchestra'),
    strict=True,
  )
)


def draw_storage(rng: StableRandom) -> Instance:
  """Instances: 72 nouns x 90 numbers = 6,480."""
  kind = rng.choice(CATEGORY_NAMES)
  noun = rng.choice(CATEGORIES[kind])
  number = str(rng.randint(10, 99))
  place = _STORAGE_PLACES[kind]
  wrong = rng.sample([p for p in _STORAGE_PLACES.values() if p != place], 3)
  fields = {'noun': noun, 'one': with_article(noun), 'number': number}
  return Instance(fields, place, tuple(wrong))


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


def draw_stars(rng: StableRandom) -> Instance:
  """Instances: 112 pairs of words of one sentiment x 90 numbers = 10,080."""
  good = rng.random_bool()
  first, two = rng.sample(POSITIVE_WORDS if good else NEGATIVE_WORDS, 2)
  fields = {'one': first, 'two': two, 'number': str(rng.randint(10, 99))}
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
