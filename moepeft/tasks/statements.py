# SPDX-License-Identifier: Apache-2.0
"""Families about what statements say: what follows and who did what."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.lexicon import COMPARATIVES, NAMES, NOUNS, with_article
from moepeft.tasks.task import Instance, Task, Template

_TRUE_FALSE = (('Yes', 'True'), ('No', 'False'))
_TRUE_FALSE_UNKNOWN = (*_TRUE_FALSE, ('Maybe', 'Unknown'))

_TRADES = (
  ('sold', 'bought'),
  ('lent', 'borrowed'),
  ('gave', 'got'),
)
_MEETINGS = tuple(
  'called helped thanked followed praised hired invited visited'.split()
)
_ACTS = (
  ('sing', 'sang'),
  ('dance', 'danced'),
  ('call', 'called'),
  ('win', 'won'),
  ('cook', 'cooked'),
  ('swim', 'swam'),
  ('laugh', 'laughed'),
  ('drive', 'drove'),
  ('paint', 'painted'),
  ('sleep', 'slept'),
  ('wait', 'waited'),
  ('run', 'ran'),
)
_DENIALS = (
  'It was {doer}, not {other}, who {past}.',
  'It was not {other} but {doer} who {past}.',
  '{doer} {past}, but {other} did not.',
  '{other} did not {act}, but {doer} did.',
)


def draw_entailment(dice: Dice) -> Instance:
  """8,832 premises, each x (1 true + 1 false + 88 open claims) = 794,880.

  A third of the draws repeats the premise, a third turns it round and a third
  claims something about another person.
  """
  taller, shorter, stranger = dice.sample(NAMES, 3)
  more = dice.pick(COMPARATIVES)
  pairs = {
    'Yes': (taller, shorter),
    'No': (shorter, taller),
    'Maybe': dice.shuffled([dice.pick((taller, shorter)), stranger]),
  }
  answer = dice.pick(tuple(pairs))
  first, second = pairs.pop(answer)
  return Instance(
    {
      'premise': f'{taller} is {more} than {shorter}',
      'claim': f'{first} is {more} than {second}',
    },
    answer,
    tuple(pairs),
  )


ENTAILMENT = Task(
  'entailment',
  'C',
  draw_entailment,
  (
    Template('follow', '{premise}. Does it follow that {claim}?'),
    Template(
      'labels', 'Premise: {premise}. Claim: {claim}.', _TRUE_FALSE_UNKNOWN
    ),
    Template('given', 'Given that {premise}, is it true that {claim}?'),
    Template('options', '{premise}. So {claim}? Options: {options}.'),
    Template('known', 'We know: {premise}. Is this so: {claim}?'),
    Template(
      'true',
      'Suppose {premise}. True, false or unknown: {claim}.',
      _TRUE_FALSE_UNKNOWN,
    ),
  ),
)


def _trade(dice: Dice, giver: str, receiver: str) -> tuple[str, str, str]:
  gave, took = dice.pick(_TRADES)
  noun_phrase = with_article(dice.pick(NOUNS))
  return (
    f'{giver} {gave} {noun_phrase} to {receiver}',
    f'{receiver} {took} {noun_phrase} from {giver}',
    f'{giver} {took} {noun_phrase} from {receiver}',
  )


def _meeting(dice: Dice, first: str, second: str) -> tuple[str, str, str]:
  did = dice.pick(_MEETINGS)
  return (
    f'{first} {did} {second}',
    f'{second} was {did} by {first}',
    f'{first} was {did} by {second}',
  )


def draw_paraphrase(dice: Dice) -> Instance:
  """552 pairs of names x (3 trades x 72 nouns + 8 meetings) x 4 = 494,592."""
  first, two = dice.sample(NAMES, 2)
  sentence, same, different = dice.pick((_trade, _meeting))(dice, first, two)
  yes = dice.coin()
  pair = [sentence, same if yes else different]
  if dice.coin():
    pair.reverse()
  answers = ('Yes', 'No') if yes else ('No', 'Yes')
  return Instance({'one': pair[0], 'two': pair[1]}, answers[0], answers[1:])


PARAPHRASE = Task(
  'paraphrase',
  'C',
  draw_paraphrase,
  (
    Template('same', '{one}. {two}. Do both sentences mean the same?'),
    Template('labels', 'One: {one}. Two: {two}. Same meaning?'),
    Template('claim', '"{one}" means "{two}".', _TRUE_FALSE),
    Template('other', 'Is "{one}" another way to say "{two}"?'),
  ),
)


def draw_negation(dice: Dice) -> Instance:
  """552 pairs of names x 12 acts x 4 denials x 2 questions = 52,992."""
  doer, bystander = dice.sample(NAMES, 2)
  act, past = dice.pick(_ACTS)
  denial = dice.pick(_DENIALS)
  text = denial.format(doer=doer, other=bystander, act=act, past=past)
  answers = (doer, bystander)
  question = f'Who {past}?'
  if dice.coin():
    answers = (bystander, doer)
    question = f'Who did not {act}?'
  return Instance({'text': text, 'question': question}, answers[0], answers[1:])


NEGATION = Task(
  'negation',
  'C',
  draw_negation,
  (
    Template('after', '{text} {question}'),
    Template('before', '{question} {text}'),
    Template('options', '{text} {question} Pick: {options}.'),
    Template('labels', 'Text: {text} Question: {question} Answer:'),
  ),
)
