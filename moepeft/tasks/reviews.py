# SPDX-License-Identifier: Apache-2.0
"""Sentiment tasks: reviews with two positive or two negative adjectives."""

from moepeft.tasks.lexicon import (
  NAMES,
  NEGATIVE_WORDS,
  POSITIVE_WORDS,
  pronoun,
  with_article,
)
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template

_VISITS = (
  ('room', 'bed', 'view', 'lobby'),
  ('soup', 'bread', 'coffee', 'menu'),
  ('film', 'sound', 'seat', 'screen'),
  ('house', 'pool', 'tour', 'food'),
  ('play', 'music', 'stage', 'hall'),
  ('floor', 'coach', 'shower', 'lesson'),
)
_ORDERS = (
  ('lamp', ('shade', 'stand', 'switch', 'light')),
  ('phone', ('screen', 'sound', 'camera', 'case')),
  ('bag', ('strap', 'lining', 'zip', 'colour')),
  ('chair', ('seat', 'back', 'frame', 'cushion')),
  ('clock', ('face', 'alarm', 'chime', 'finish')),
  ('oven', ('door', 'timer', 'tray', 'handle')),
)

_GOOD_BAD = (('positive', 'good'), ('negative', 'bad'))
_YES_NO = (('positive', 'Yes'), ('negative', 'No'))
_HAPPY_UNHAPPY = (('positive', 'happy'), ('negative', 'unhappy'))


def _verdicts(rng: StableRandom, parts: tuple[str, ...], good: bool) -> str:
  words = rng.sample(POSITIVE_WORDS if good else NEGATIVE_WORDS, 2)
  first, second = rng.sample(parts, 2)
  return f'the {first} was {words[0]} and the {second} was {words[1]}.'


def draw_sentiment(rng: StableRandom) -> Instance:
  """Instances: 24 names x 72 pairs of parts x 112 of adjectives = 193,536."""
  good = rng.random_bool()
  name = rng.choice(NAMES)
  verdicts = _verdicts(rng, rng.choice(_VISITS), good)
  answers = ('positive', 'negative') if good else ('negative', 'positive')
  return Instance(
    {'review': f'{name} says {verdicts}', 'name': name},
    answers[0],
    answers[1:],
  )


SENTIMENT = Task(
  'sentiment',
  'A',
  draw_sentiment,
  (
    Template('or', '{review} Is this positive or negative?'),
    Template('like', '{review} Did {name} like it?', _YES_NO),
    Template('verdict', '{review} All in all, it was', _GOOD_BAD),
    Template('feel', '{review} {name} felt ({options})', _HAPPY_UNHAPPY),
    Template('tone', 'Give the tone of this review. {review}'),
    Template('mood', 'Positive or negative? {review}'),
  ),
)


def draw_verdict(rng: StableRandom) -> Instance:
  """Instances: 24 names x 72 pairs of parts x 112 of adjectives = 193,536."""
  good = rng.random_bool()
  name = rng.choice(NAMES)
  order, parts = rng.choice(_ORDERS)
  verdicts = _verdicts(rng, parts, good)
  answers = ('keep', 'return') if good else ('return', 'keep')
  fields = {
    'report': f'{name} got {with_article(order)}: {verdicts}',
    'order': order,
    'name': name,
    'she': pronoun(name),
  }
  return Instance(fields, answers[0], answers[1:])


VERDICT = Task(
  'verdict',
  'B',
  draw_verdict,
  (
    Template('will', '{report} Will {she} keep or return it?'),
    Template('next', '{report} What will {name} do?'),
    Template('options', '{report} Next step ({options}):'),
    Template('advise', 'Advise {name}. {report} It is one to'),
    Template('keep', 'Keep or return? {report}'),
  ),
)
