# SPDX-License-Identifier: Apache-2.0
"""python scripts/make_chats.py: writes moepeft/assets/chats, 200 conversations.

All texts are of our own making, from templates here and facts in
data_facts.py, drawn with a fixed seed. Most conversations are in English and a
sixth in Chinese; some have a system turn, some have two questions.
"""

import json
import pathlib
import random

from data_facts import (
  CHINESE_COUNTRIES,
  CHINESE_NAMES,
  COLOURS,
  COUNTRIES,
  DAYS,
  ELEMENTS,
  EXPLANATIONS,
  GOODS,
  NAMES,
  PLACES,
  UNITS,
  WORDS,
  json_lines,
  write,
)

COUNT = 200
OUTPUT = pathlib.Path(__file__).parents[1] / 'moepeft/assets/chats/chats.jsonl'


def shopping(rng: random.Random) -> list[str]:
  name, goods = rng.choice(NAMES), rng.choice(GOODS)
  price, count = rng.randint(2, 9), rng.randint(3, 12)
  paid = rng.choice([p for p in (50, 100, 120) if p > price * count])
  cost = price * count
  return [
    f'{name} buys {count} {goods} at {price} coins each. How much is that?',
    f'{count} times {price} is {cost}, so {name} pays {cost} coins.',
    f'And what is the change from {paid} coins?',
    f'{paid} minus {cost} is {paid - cost}, so the change is {paid - cost} '
    'coins.',
  ]


def sharing(rng: random.Random) -> list[str]:
  goods, people, each = rng.choice(GOODS), rng.randint(2, 9), rng.randint(3, 9)
  rest = rng.randint(0, people - 1)
  total = people * each + rest
  left = f'{rest} left over' if rest else 'nothing left over'
  return [
    f'{total} {goods} are shared equally among {people} people. How many does '
    'each get, and how many are left over?',
    f'Each person gets {each} {goods}, with {left}: {people} times {each} is '
    f'{people * each}.',
  ]


def converting(rng: random.Random) -> list[str]:
  large, small, factor = rng.choice(UNITS)
  count = rng.randint(2, 15)
  return [
    f'How many {small} are {count} {large}?',
    f'{count} {large} are {count * factor} {small}.',
  ]


def country(rng: random.Random) -> list[str]:
  name, capital, language, continent = rng.choice(COUNTRIES)
  turns = [
    rng.choice(
      (f'What is the capital of {name}?', f'Name the capital of {name}.')
    ),
    f'The capital of {name} is {capital}.',
  ]
  if rng.random() < 0.5:
    turns += [
      'On which continent is it, and which language does the state use?',
      f'{name} is in {continent}, and the language of the state is {language}.',
    ]
  return turns


def element(rng: random.Random) -> list[str]:
  name, symbol, number = rng.choice(ELEMENTS)
  return rng.choice(
    (
      [
        f'What is the chemical symbol of {name}?',
        f'The symbol of {name} is {symbol}.',
      ],
      [
        f'Which element has the atomic number {number}?',
        f'The element with the atomic number {number} is {name}, {symbol}.',
      ],
    )
  )


def ordering(rng: random.Random) -> list[str]:
  words = rng.sample([word for word, _ in WORDS], 5)
  return [
    f'Put these words into alphabetical order: {", ".join(words)}.',
    f'{", ".join(sorted(words))}.',
  ]


def counting(rng: random.Random) -> list[str]:
  numbers = [rng.randint(10, 99) for _ in range(5)]
  return [
    f'What are the smallest and the largest of {", ".join(map(str, numbers))}?',
    f'The smallest is {min(numbers)} and the largest is {max(numbers)}.',
  ]


def extracting(rng: random.Random) -> list[str]:
  name, place, day = rng.choice(NAMES), rng.choice(PLACES), rng.choice(DAYS)
  hour = rng.randint(8, 18)
  found = {'name': name, 'place': place, 'day': day, 'hour': hour}
  return [
    f'Answer with JSON that has the keys name, place, day and hour: "{name} '
    f'waits at the {place} on {day} at {hour}:00."',
    json.dumps(found),
  ]


def polite(rng: random.Random) -> list[str]:
  name = rng.choice(NAMES)
  task = rng.choice(
    (
      'close the window',
      'send the report',
      'call me back',
      'water the plants',
      'lower the music',
      'bring the keys',
    )
  )
  return [
    f'Make this polite: "{name}, {task} now."',
    f'"{name}, could you please {task}? Thank you."',
  ]


def calendar(rng: random.Random) -> list[str]:
  start, days = rng.randrange(7), rng.randint(2, 20)
  return [
    f'Today is {DAYS[start]}. Which day of the week is it in {days} days?',
    f'In {days} days it is {DAYS[(start + days) % 7]}.',
  ]


def colours(rng: random.Random) -> list[str]:
  chosen, count = rng.sample(COLOURS, 3), [rng.randint(1, 9) for _ in range(3)]
  parts = [f'{n} {colour}' for n, colour in zip(count, chosen, strict=True)]
  return [
    f'A box holds {parts[0]}, {parts[1]} and {parts[2]} marbles. How many '
    'marbles are there?',
    f'{count[0]} + {count[1]} + {count[2]} = {sum(count)}. There are '
    f'{sum(count)} marbles.',
  ]


def explaining(rng: random.Random) -> list[str]:
  return list(rng.choice(EXPLANATIONS))


def translating(rng: random.Random) -> list[str]:
  english, chinese = rng.choice(WORDS)
  return rng.choice(
    (
      [f'“{english}”用中文怎么说？', f'“{english}”的中文是“{chinese}”。'],
      [f'“{chinese}”用英语怎么说？', f'“{chinese}”的英语是“{english}”。'],
    )
  )


def chinese_sum(rng: random.Random) -> list[str]:
  name, other = rng.sample(CHINESE_NAMES, 2)
  one, two = rng.randint(3, 40), rng.randint(3, 40)
  return [
    f'{name}有{one}本书，{other}有{two}本书，一共有多少本？',
    f'{one}加{two}等于{one + two}，一共有{one + two}本书。',
  ]


def chinese_capital(rng: random.Random) -> list[str]:
  name, capital = rng.choice(CHINESE_COUNTRIES)
  return [f'{name}的首都是哪里？', f'{name}的首都是{capital}。']


_KINDS = (
  shopping,
  sharing,
  converting,
  country,
  element,
  ordering,
  counting,
  extracting,
  polite,
  calendar,
  colours,
  explaining,
  translating,
  chinese_sum,
  chinese_capital,
)
_SYSTEMS = (
  'You are a helpful assistant. Answer briefly.',
  'You are a patient teacher. Answer in one or two sentences.',
)


def rows() -> list[dict]:
  """The conversations as OpenAI's messages; every first question differs."""
  rng, found, asked = random.Random(0), [], set()
  while len(found) < COUNT:
    turns = _KINDS[rng.randrange(len(_KINDS))](rng)
    system = rng.choice(_SYSTEMS) if rng.random() < 0.2 else None
    if turns[0] in asked:
      continue
    asked.add(turns[0])
    messages = [{'role': 'system', 'content': system}] if system else []
    for i, text in enumerate(turns):
      messages.append(
        {'role': 'assistant' if i % 2 else 'user', 'content': text}
      )
    found.append({'messages': messages})
  return found


def text() -> str:
  """The file that ships."""
  return json_lines(rows())


if __name__ == '__main__':
  write(OUTPUT, text())
