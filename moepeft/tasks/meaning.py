# SPDX-License-Identifier: Apache-2.0
"""Families about what words and sentences mean; none of them is trained on."""

from moepeft.tasks.dice import Dice
from moepeft.tasks.lexicon import (
  ANTONYMS,
  CATEGORIES,
  CATEGORY_NAMES,
  MEN,
  NAMES,
  PLACES,
  WOMEN,
  pronoun,
)
from moepeft.tasks.task import Instance, Task, Template

_DEEDS = tuple(
  'called helped thanked followed praised hired invited visited met '
  'warned'.split()
)
_REASONS = (
  'before {} left',
  'after {} woke up',
  'when {} came home',
  'while {} was ill',
  'because {} was late',
  'since {} was kind',
  'as {} sat down',
  'when {} moved out',
)

_DAYS = (
  'Today',
  'Yesterday',
  'On Monday',
  'On Friday',
  'In May',
  'In June',
  'Last week',
  'Last year',
)
_SENSES = {
  'bat': {
    'animal': ('heard a bat in the cave', 'saw a bat fly at dusk'),
    'stick': ('hit the ball with a bat', 'swung a bat in the game'),
  },
  'bank': {
    'money': ('took a loan from the bank', 'paid coins into the bank'),
    'river': ('fished from the bank', 'swam to the other bank'),
  },
  'ring': {
    'jewel': ('wore a gold ring', 'put a ring on a finger'),
    'sound': ('heard the ring of a bell', 'woke at the ring of the phone'),
  },
  'bark': {
    'tree': ('peeled the bark off an oak', 'carved a name in the bark'),
    'dog': ('heard a loud bark', 'feared the bark of the hound'),
  },
  'seal': {
    'animal': ('fed fish to a seal', 'watched a seal swim'),
    'stamp': ('broke the seal of the letter', 'put a wax seal on it'),
  },
  'match': {
    'fire': ('lit the candle with a match', 'struck a match in the dark'),
    'game': ('won the tennis match', 'lost the last match by a goal'),
  },
  'nail': {
    'finger': ('painted a nail pink', 'bit a nail on the left hand'),
    'metal': ('hung it on a rusty nail', 'hit the nail into the wall'),
  },
  'spring': {
    'season': ('planted bulbs in spring', 'waited for a warm spring'),
    'coil': ('fixed the spring of the bed', 'oiled a rusty spring'),
  },
  'trunk': {
    'animal': ('touched an elephant by its trunk', 'saw a grey trunk wave'),
    'luggage': ('packed the trunk for a trip', 'locked clothes in a trunk'),
  },
  'crane': {
    'bird': ('spotted the nest of a crane', 'saw a crane catch a frog'),
    'machine': ('lifted bricks with a crane', 'drove a crane on the site'),
  },
  'palm': {
    'tree': ('sat under a palm on the beach', 'cut dates from the palm'),
    'hand': ('held a coin in one palm', 'wrote on the palm with a pen'),
  },
  'letter': {
    'mail': ('posted a letter to a friend', 'put a stamp on the letter'),
    'alphabet': ('spelled it with one letter', 'left a letter out of a word'),
  },
}

_ENDINGS = (
  ('thirsty', 'drank water'),
  ('hungry', 'ate some bread'),
  ('tired', 'took a nap'),
  ('cold', 'put on a coat'),
  ('hot', 'opened a window'),
  ('lost', 'asked the way'),
  ('ill', 'saw a doctor'),
  ('bored', 'read a book'),
  ('dirty', 'had a bath'),
  ('late', 'ran to work'),
  ('scared', 'hid in a corner'),
  ('wet', 'found a towel'),
)


def draw_coreference(dice: Dice) -> Instance:
  """A woman and a man: 288 pairs x 10 deeds x 8 reasons x 2 = 46,080."""
  pair = dice.shuffled([dice.pick(WOMEN), dice.pick(MEN)])
  who = dice.below(2)
  she = pronoun(pair[who])
  reason = dice.pick(_REASONS).format(she)
  text = f'{pair[0]} {dice.pick(_DEEDS)} {pair[1]} {reason}.'
  return Instance({'text': text, 'she': she}, pair[who], (pair[1 - who],))


COREFERENCE = Task(
  'coreference',
  'C',
  draw_coreference,
  (
    Template('who', '{text} Who is "{she}"?'),
    Template('refer', '{text} The word "{she}" refers to'),
    Template('options', '{text} Pick a name for "{she}": {options}.'),
    Template('stand', 'Whom does "{she}" stand for? {text}'),
  ),
)


def draw_word_sense(dice: Dice) -> Instance:
  """48 uses of 12 words x 24 names x 8 days = 9,216."""
  word = dice.pick(tuple(_SENSES))
  sense, wrong_sense = dice.shuffled(tuple(_SENSES[word]))
  use = dice.pick(_SENSES[word][sense])
  text = f'{dice.pick(_DAYS)} {dice.pick(NAMES)} {use}.'
  return Instance({'text': text, 'word': word}, sense, (wrong_sense,))


WORD_SENSE = Task(
  'word_sense',
  'C',
  draw_word_sense,
  (
    Template('means', '{text} What does "{word}" mean here?'),
    Template('options', '{text} Pick the sense of "{word}": {options}.'),
    Template('kind', 'Which kind of {word} is this? {text}'),
    Template('sense', '{text} Sense of "{word}":'),
  ),
)


def draw_completion(dice: Dice) -> Instance:
  """8 days x 24 names x 12 places x 12 states = 27,648."""
  states = dice.sample(_ENDINGS, 4)
  name = dice.pick(NAMES)
  text = (
    f'{dice.pick(_DAYS)}, near the {dice.pick(PLACES)},'
    f' {name} was {states[0][0]}, so {pronoun(name)}'
  )
  endings = [ending for _, ending in states]
  return Instance({'text': text}, endings[0], tuple(endings[1:]))


COMPLETION = Task(
  'completion',
  'C',
  draw_completion,
  (
    Template('go_on', '{text}'),
    Template('finish', 'Finish the sentence. {text}'),
    Template('next', 'What comes next? {text} ...'),
    Template('story', 'Story: {text} ... How does it end?'),
  ),
)


def _opposites(dice: Dice) -> tuple[str, str, str, list[str]]:
  pairs = [dice.shuffled(pair) for pair in dice.sample(ANTONYMS, 5)]
  (first, two), (three, four) = pairs[:2]
  return first, two, three, [four, *(pair[0] for pair in pairs[2:])]


def _kinds(dice: Dice) -> tuple[str, str, str, list[str]]:
  kinds = dice.sample(CATEGORY_NAMES, 4)
  first, three = (dice.pick(CATEGORIES[kind]) for kind in kinds[:2])
  return first, kinds[0], three, [kinds[1], kinds[0], *kinds[2:]]


def draw_analogy(dice: Dice) -> Instance:
  """Half 4,320 pairs of nouns, half 2,208 pairs of adjectives."""
  first, two, three, choices = dice.pick((_opposites, _kinds))(dice)
  return Instance(
    {'one': first, 'two': two, 'three': three}, choices[0], tuple(choices[1:])
  )


ANALOGY = Task(
  'analogy',
  'C',
  draw_analogy,
  (
    Template('as', '{one} is to {two} as {three} is to'),
    Template('pairs', 'Complete the pair. {one}: {two}. {three}:'),
    Template(
      'options', '{one} goes with {two}. {three} goes with one of: {options}.'
    ),
    Template('same', '{three} is to what, as {one} is to {two}?'),
  ),
)
