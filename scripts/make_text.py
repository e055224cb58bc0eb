# SPDX-License-Identifier: Apache-2.0
"""python scripts/make_text.py: writes moepeft/assets/text, about 110 kB.

A plain text of our own making to pretrain small models on: short diaries of a
town, one passage each, generated from templates here and words in
data_facts.py with a fixed seed. Sums in a passage are right, and whoever is
somewhere stays there until the passage says otherwise, so there is something to
learn beyond spelling. One passage in eight is in Chinese.
"""

import pathlib
import random

from data_facts import (
  CHINESE_NAMES,
  COLOURS,
  DAYS,
  GOODS,
  NAMES,
  PLACES,
  write,
)

SIZE = 110_000
OUTPUT = pathlib.Path(__file__).parents[1] / 'moepeft/assets/text/text.txt'
_WEATHER = (
  ('It rained all morning', 'wet'),
  ('The sun shone', 'dry'),
  ('Snow fell in the night', 'white'),
  ('Fog lay over the river', 'grey'),
  ('A warm wind came from the south', 'dry'),
)
_WORK = ('the painter', 'the carpenter', 'the postman', 'the gardener')


def trade(rng: random.Random) -> str:
  """A day of selling; what is left is what was there less what was sold."""
  name, goods, day = rng.choice(NAMES), rng.choice(GOODS), rng.choice(DAYS)
  start, price = rng.randint(20, 60), rng.randint(2, 9)
  first, second = rng.randint(2, 9), rng.randint(2, 9)
  left = start - first - second
  return (
    f'On {day} {name} came to the market with {start} {goods}. {first} were '
    f'sold before noon and {second} after it, at {price} coins each. In the '
    f'evening {left} {goods} were left, and there were '
    f'{price * (first + second)} coins in the box.'
  )


def walk(rng: random.Random) -> str:
  """Two people walk between places; the last sentence says where they are."""
  one, two = rng.sample(NAMES, 2)
  first, second, third = rng.sample(PLACES, 3)
  weather, street = rng.choice(_WEATHER)
  thing, colour = rng.choice(GOODS)[:-1], rng.choice(COLOURS)
  return (
    f'{weather}, and the streets were {street}. {one} went to the {first} and '
    f'{two} went to the {second}. At the {first} {one} found a {colour} '
    f'{thing} and carried it to the {third}. {two} stayed at the {second}. So '
    f'{one} and the {colour} {thing} were at the {third}, and {two} was at the '
    f'{second}.'
  )


def letter(rng: random.Random) -> str:
  """A short letter with a plan and an answer to it."""
  one, two = rng.sample(NAMES, 2)
  place, (early, late) = rng.choice(PLACES), sorted(rng.sample(range(8, 19), 2))
  day = rng.choice(DAYS)
  hours = 'an hour' if late - early == 1 else f'{late - early} hours'
  return (
    f'"Dear {two}," wrote {one}, "can we meet at the {place} on {day} at '
    f'{early}?" {two} answered: "At {early} I am at work, but I can come to '
    f'the {place} at {late}." So they met at the {place} on {day}, {hours} '
    f'later than {one} had planned.'
  )


def house(rng: random.Random) -> str:
  """Work at a house; the days are counted."""
  name, worker = rng.choice(NAMES), rng.choice(_WORK)
  start, days = rng.randrange(7), rng.randint(2, 5)
  old, new = rng.sample(COLOURS, 2)
  end = DAYS[(start + days - 1) % 7]
  return (
    f'The door of {name} was {old}, and {name} wanted a {new} one. On '
    f'{DAYS[start]} {worker} began. The work took {days} days, so it was '
    f'finished on {end}, and the door was {new}. {name} thanked {worker} and '
    'made tea for everybody.'
  )


def chinese(rng: random.Random) -> str:
  """The same kind of diary in Chinese."""
  one, two = rng.sample(CHINESE_NAMES, 2)
  start, given = rng.randint(12, 40), rng.randint(2, 9)
  left = start - given
  return (
    f'早上{one}有{start}个苹果。{one}给了{two}{given}个，自己还有{left}个。'
    f'下午{two}又还给{one}一个，这时{one}有{left + 1}个苹果，{two}有'
    f'{given - 1}个。'
  )


def text() -> str:
  """The file that ships: passages with an empty line between them."""
  rng, passages, size = random.Random(2), {}, 0
  kinds = (trade, walk, letter, house) * 2 + (chinese,)
  while size < SIZE:
    passage = rng.choice(kinds)(rng)
    if passage not in passages:
      passages[passage] = None
      size += len(passage.encode()) + 2
  return '\n\n'.join(passages) + '\n'


if __name__ == '__main__':
  write(OUTPUT, text())
