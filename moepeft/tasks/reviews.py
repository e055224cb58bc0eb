# SPDX-License-Identifier: Apache-2.0
"""Families about opinions: two judgements of one colour on one thing."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.family import Family, Instance, Template
from moepeft.tasks.lexicon import BLAME, NAMES, PRAISE, a, pronoun

_VISITS = {
  'hotel': ('room', 'bed', 'view', 'lobby'),
  'cafe': ('soup', 'bread', 'coffee', 'menu'),
  'cinema': ('film', 'sound', 'seat', 'screen'),
  'farm': ('house', 'pool', 'tour', 'food'),
  'theatre': ('play', 'music', 'stage', 'hall'),
  'gym': ('floor', 'trainer', 'shower', 'lesson'),
}
_ORDERS = {
  'lamp': ('shade', 'stand', 'switch', 'light'),
  'phone': ('screen', 'sound', 'camera', 'case'),
  'bag': ('strap', 'lining', 'zip', 'colour'),
  'chair': ('seat', 'back', 'frame', 'cushion'),
  'clock': ('face', 'alarm', 'chime', 'finish'),
  'oven': ('door', 'timer', 'tray', 'handle'),
}

_GOOD_BAD = (('positive', 'good'), ('negative', 'bad'))
_YES_NO = (('positive', 'Yes'), ('negative', 'No'))
_HAPPY_UNHAPPY = (('positive', 'happy'), ('negative', 'unhappy'))


def _judged(dice: Dice, parts: tuple[str, ...], good: bool) -> str:
  words = dice.some(PRAISE if good else BLAME, 2)
  first, second = dice.some(parts, 2)
  return f'The {first} was {words[0]} and the {second} was {words[1]}.'


def draw_sentiment(dice: Dice) -> Instance:
  """24 names x 6 visits x 12 pairs x 264 pairs of judgements = 456,192."""
  good = dice.coin()
  name = dice.pick(NAMES)
  visit = dice.pick(tuple(_VISITS))
  judged = _judged(dice, _VISITS[visit], good)
  answers = ('positive', 'negative') if good else ('negative', 'positive')
  return Instance(
    {'review': f'{name} went to {a(visit)}. {judged}', 'name': name},
    answers[0],
    answers[1:],
  )


SENTIMENT = Family(
  'sentiment',
  'A',
  draw_sentiment,
  (
    Template('or', '{review} Is this review positive or negative?'),
    Template('like', '{review} Did {name} like it?', _YES_NO),
    Template('verdict', '{review} All in all, it was', _GOOD_BAD),
    Template('feel', '{review} {name} felt ({options})', _HAPPY_UNHAPPY),
    Template('tone', 'Give the tone of this review. {review}'),
    Template('mood', 'Positive or negative? {review}'),
  ),
)


def draw_verdict(dice: Dice) -> Instance:
  """24 names x 6 orders x 12 pairs x 264 pairs of judgements = 456,192."""
  good = dice.coin()
  name = dice.pick(NAMES)
  order = dice.pick(tuple(_ORDERS))
  judged = _judged(dice, _ORDERS[order], good)
  answers = ('keep', 'return') if good else ('return', 'keep')
  fields = {
    'report': f'{name} got {a(order)}. {judged}',
    'order': order,
    'name': name,
    'she': pronoun(name),
  }
  return Instance(fields, answers[0], answers[1:])


VERDICT = Family(
  'verdict',
  'B',
  draw_verdict,
  (
    Template('will', '{report} Will {she} keep or return it?'),
    Template('next', '{report} What will {name} do with the {order}?'),
    Template('options', '{report} Next step ({options}):'),
    Template('advise', 'Advise {name}. {report} The {order} is one to'),
    Template('keep', 'Keep or return? {report}'),
  ),
)
