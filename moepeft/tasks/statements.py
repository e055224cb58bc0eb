# SPDX-License-Identifier: Apache-2.0
"""Families about what statements say: what follows, agrees, or is denied."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.family import Family, Instance, Template
from moepeft.tasks.lexicon import COMPARATIVES, NAMES, NOUNS, a

TRUE_FALSE = (('Yes', 'True'), ('No', 'False'))
TRUE_FALSE_UNKNOWN = (*TRUE_FALSE, ('Maybe', 'Unknown'))

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


def _relation(dice: Dice) -> tuple[str, str]:
  """A comparative and its opposite, in either order."""
  first, second = dice.pick(COMPARATIVES)
  return (first, second) if dice.coin() else (second, first)


def _restated(dice: Dice, one: str, two: str, more: str, less: str) -> str:
  """`one is more than two` in the same or in the opposite words."""
  if dice.coin():
    return f'{one} is {more} than {two}'
  return f'{two} is {less} than {one}'


def draw_entailment(dice: Dice) -> Instance:
  """12,144 triples of names x 16 comparatives x 7 claims = 1.4 million.

  Of each three claims one follows, one is denied and one, about a third
  person, is open.
  """
  one, two, three = dice.some(NAMES, 3)
  more, less = _relation(dice)
  answer = dice.pick(('Yes', 'No', 'Maybe'))
  if answer == 'Yes':
    claim = _restated(dice, one, two, more, less)
  elif answer == 'No':
    claim = _restated(dice, two, one, more, less)
  else:
    pair = dice.shuffled([dice.pick((one, two)), three])
    claim = _restated(dice, *pair, more, less)
  others = tuple(x for x in ('Yes', 'No', 'Maybe') if x != answer)
  return Instance(
    {'premise': f'{one} is {more} than {two}', 'claim': claim}, answer, others
  )


ENTAILMENT = Family(
  'entailment',
  'A',
  draw_entailment,
  (
    Template('follow', '{premise}. Does it follow that {claim}?'),
    Template(
      'labels', 'Premise: {premise}. Claim: {claim}.', TRUE_FALSE_UNKNOWN
    ),
    Template('given', 'Given that {premise}, is it true that {claim}?'),
    Template('options', '{premise}. So {claim}? Options: {options}.'),
    Template('known', 'We know: {premise}. Is this so: {claim}?'),
    Template(
      'true',
      'Suppose {premise}. True, false or unknown: {claim}.',
      TRUE_FALSE_UNKNOWN,
    ),
  ),
)


def draw_debate(dice: Dice) -> Instance:
  """255,024 quadruples of names x 16 comparatives x 4 replies = 16 million."""
  first, second, one, two = dice.some(NAMES, 4)
  more, less = _relation(dice)
  agree = dice.coin()
  reply = (one, two) if agree else (two, one)
  says = f'{one} is {more} than {two}'
  answers = ('agree', 'argue') if agree else ('argue', 'agree')
  fields = {
    'talk': (
      f'{first} says {says}. {second} says'
      f' {_restated(dice, *reply, more, less)}.'
    ),
    'pair': f'{first} and {second}',
  }
  return Instance(fields, answers[0], answers[1:])


DEBATE = Family(
  'debate',
  'B',
  draw_debate,
  (
    Template('do', '{talk} Do {pair} agree or argue?'),
    Template('they', '{talk} {pair}'),
    Template('options', '{talk} What do they do? Options: {options}.'),
    Template('listen', 'Listen to {pair}. {talk} The two'),
    Template('agree', 'Agree or argue? {talk}'),
  ),
)


def _trade(dice: Dice, one: str, two: str) -> tuple[str, str, str]:
  gave, took = dice.pick(_TRADES)
  thing = a(dice.pick(NOUNS))
  return (
    f'{one} {gave} {thing} to {two}',
    f'{two} {took} {thing} from {one}',
    f'{one} {took} {thing} from {two}',
  )


def _meeting(dice: Dice, one: str, two: str) -> tuple[str, str, str]:
  did = dice.pick(_MEETINGS)
  return (
    f'{one} {did} {two}',
    f'{two} was {did} by {one}',
    f'{one} was {did} by {two}',
  )


def draw_paraphrase(dice: Dice) -> Instance:
  """552 pairs of names x (3 trades x 96 nouns + 8 meetings) x 4 = 653,568."""
  one, two = dice.some(NAMES, 2)
  said, same, other = dice.pick((_trade, _meeting))(dice, one, two)
  yes = dice.coin()
  pair = [said, same if yes else other]
  if dice.coin():
    pair.reverse()
  answers = ('Yes', 'No') if yes else ('No', 'Yes')
  return Instance({'one': pair[0], 'two': pair[1]}, answers[0], answers[1:])


PARAPHRASE = Family(
  'paraphrase',
  'C',
  draw_paraphrase,
  (
    Template('same', '{one}. {two}. Do both sentences mean the same?'),
    Template('labels', 'One: {one}. Two: {two}. Same meaning?'),
    Template('claim', '"{one}" means "{two}".', TRUE_FALSE),
    Template('other', 'Is "{one}" another way to say "{two}"?'),
  ),
)


def draw_negation(dice: Dice) -> Instance:
  """552 pairs of names x 12 acts x 4 denials x 2 questions = 52,992."""
  doer, other = dice.some(NAMES, 2)
  act, past = dice.pick(_ACTS)
  denial = dice.pick(_DENIALS)
  text = denial.format(doer=doer, other=other, act=act, past=past)
  answers = (doer, other)
  question = f'Who {past}?'
  if dice.coin():
    answers = (other, doer)
    question = f'Who did not {act}?'
  return Instance({'text': text, 'question': question}, answers[0], answers[1:])


NEGATION = Family(
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
