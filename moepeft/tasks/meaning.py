# SPDX-License-Identifier: Apache-2.0
"""Tasks about the meaning of words and sentences, for evaluation only."""

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
from moepeft.tasks.stable_random import StableRandom
from moepeft.tasks.task import Instance, Task, Template

_VERBS = tuple(
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

_STATE_ENDINGS = (
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


def draw_coreference(rng: StableRandom) -> Instance:
  """Instances: 288 pairs of names x 10 verbs x 8 reasons x 2 = 46,080."""
  pair = rng.shuffled([rng.choice(WOMEN), rng.choice(MEN)])
  index = rng.randbelow(2)
  she = pronoun(pair[index])
  reason = rng.choice(_REASONS).format(she)
  text = f'{pair[0]} {rng.choice(_VERBS)} {pair[1]} {reason}.'
  return Instance({'text': text, 'she': she}, pair[index], (pair[1 - index],))


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


def draw_word_sense(rng: StableRandom) -> Instance:
  """Instances: 48 uses of 12 words x 24 names x 8 days = 9,216."""
  word = rng.choice(tuple(_SENSES))
  sense, wrong_sense = rng.shuffled(tuple(_SENSES[word]))
  use = rng.choice(_SENSES[word][sense])
  text = f'{rng.choice(_DAYS)} {rng.choice(NAMES)} {use}.'
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


def draw_completion(rng: StableRandom) -> Instance:
  """Instances: 8 days x 24 names x 12 places x 12 states = 27,648."""
  states = rng.sample(_STATE_ENDINGS, 4)
  name = rng.choice(NAMES)
  text = (
    f'{rng.choice(_DAYS)}, near the {rng.choice(PLACES)},'
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


def _antonym_analogy(rng: StableRandom) -> tuple[str, str, str, list[str]]:
  pairs = [rng.shuffled(pair) for pair in rng.sample(ANTONYMS, 5)]
  (first, two), (three, four) = pairs[:2]
  return first, two, three, [four, *(pair[0] for pair in pairs[2:])]


def _category_analogy(rng: StableRandom) -> tuple[str, str, str, list[str]]:
  kinds = rng.sample(CATEGORY_NAMES, 4)
  first, three = (rng.choice(CATEGORIES[kind]) for kind in kinds[:2])
  return first, kinds[0], three, [kinds[1], kinds[0], *kinds[2:]]


def draw_analogy(rng: StableRandom) -> Instance:
  """Instances: 4,320 pairs of nouns and 2,208 pairs of adjectives."""
  draw_words = rng.choice((_antonym_analogy, _category_analogy))
  first, two, three, choices = draw_words(rng)
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
