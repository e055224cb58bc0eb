# SPDX-License-Identifier: Apache-2.0
"""Inference tasks: entailment, paraphrase and negation."""

from moepeft.tasks.lexicon import COMPARATIVES, NAMES, NOUNS, with_article
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template

_TRUE_FALSE = (('Yes', 'True'), ('No', 'False'))
_TRUE_FALSE_UNKNOWN = (*_TRUE_FALSE, ('Maybe', 'Unknown'))

_TRADE_VERBS = (
  ('sold', 'bought'),
  ('lent', 'borrowed'),
  ('gave', 'got'),
)
_VERBS = tuple(
  'called helped thanked followed praised hired invited visited'.split()
)
_VERB_FORMS = (
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


def draw_entailment(rng: StableRandom) -> Instance:
  """Instances: 8,832 premises x (1 true + 1 false + 88 open claims) = 794,880.

  In a third of the draws the claim is the premise, in a third its converse, and
  in a third it is about another person.
  """
  taller, shorter, stranger = rng.sample(NAMES, 3)
  more = rng.choice(COMPARATIVES)
  pairs = {
    'Yes': (taller, shorter),
    'No': (shorter, taller),
    'Maybe': rng.shuffled([rng.choice((taller, shorter)), stranger]),
  }
  answer = rng.choice(tuple(pairs))
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


def _trade_pair(
  rng: StableRandom, giver: str, receiver: str
) -> tuple[str, str, str]:
  gave, took = rng.choice(_TRADE_VERBS)
  noun_phrase = with_article(rng.choice(NOUNS))
  return (
    f'{giver} {gave} {noun_phrase} to {receiver}',
    f'{receiver} {took} {noun_phrase} from {giver}',
    f'{giver} {took} {noun_phrase} from {receiver}',
  )


def _voice_pair(
  rng: StableRandom, first: str, second: str
) -> tuple[str, str, str]:
  did = rng.choice(_VERBS)
  return (
    f'{first} {did} {second}',
    f'{second} was {did} by {first}',
    f'{first} was {did} by {second}',
  )


def draw_paraphrase(rng: StableRandom) -> Instance:
  """Instances: 552 pairs of names x (3 x 72 nouns + 8 verbs) x 4 = 494,592."""
  first, two = rng.sample(NAMES, 2)
  draw_sentences = rng.choice((_trade_pair, _voice_pair))
  sentence, same, different = draw_sentences(rng, first, two)
  yes = rng.random_bool()
  pair = [sentence, same if yes else different]
  if rng.random_bool():
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


def draw_negation(rng: StableRandom) -> Instance:
  """Instances: 552 pairs of names x 12 verbs x 4 denials x 2 = 52,992."""
  doer, bystander = rng.sample(NAMES, 2)
  act, past = rng.choice(_VERB_FORMS)
  denial = rng.choice(_DENIALS)
  text = denial.format(doer=doer, other=bystander, act=act, past=past)
  answers = (doer, bystander)
  question = f'Who {past}?'
  if rng.random_bool():
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
