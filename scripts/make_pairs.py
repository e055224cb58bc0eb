# SPDX-License-Identifier: Apache-2.0
"""python scripts/make_pairs.py: writes moepeft/assets/pairs, 200 pairs.

All texts are of our own making, from templates here and facts in
data_facts.py, drawn with a fixed seed. The chosen answer is right, to the point
and in the form that was asked for; the rejected one is wrong, evasive, rude, or
in another form.
"""

import pathlib
import random

from data_facts import (
  CHINESE_COUNTRIES,
  COUNTRIES,
  ELEMENTS,
  EXPLANATIONS,
  GOODS,
  NAMES,
  UNITS,
  WORDS,
  json_lines,
  write,
)

COUNT = 200
OUTPUT = pathlib.Path(__file__).parents[1] / 'moepeft/assets/pairs/pairs.jsonl'
# Answers that answer nothing.
_EVASIVE = (
  'That is hard to say. It depends on many things, and one could look at it in '
  'several ways.',
  'There are many opinions about that, and I would rather not say.',
  'Good question! It is a topic that people have thought about for long.',
)
_RUDE = (
  'Everybody knows that. Look it up yourself.',
  'Why do you ask me such a thing?',
)


def _poor(rng: random.Random, wrong: str) -> str:
  """A wrong answer half of the time, else an evasive or a rude one."""
  if rng.random() < 0.5:
    return wrong
  return rng.choice(_EVASIVE + _RUDE)


def _other(rng: random.Random, right: int) -> int:
  return right + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))


def adding(rng: random.Random) -> tuple[str, str, str]:
  one, two = rng.randint(11, 99), rng.randint(11, 99)
  wrong = _other(rng, one + two)
  return (
    f'Add {one} and {two}.',
    f'{one} + {two} = {one + two}.',
    _poor(rng, f'{one} + {two} = {wrong}.'),
  )


def taking_away(rng: random.Random) -> tuple[str, str, str]:
  name, goods = rng.choice(NAMES), rng.choice(GOODS)
  total, given = rng.randint(20, 60), rng.randint(3, 18)
  left = total - given
  return (
    f'{name} has {total} {goods} and gives away {given}. How many are left?',
    f'{name} has {left} {goods} left, because {total} - {given} = {left}.',
    _poor(rng, f'{name} has {_other(rng, left)} {goods} left.'),
  )


def comparing(rng: random.Random) -> tuple[str, str, str]:
  large, small, factor = rng.choice(UNITS)
  count = rng.randint(2, 9)
  more = count * factor
  fewer = more - rng.randint(1, min(factor - 1, 9))
  return (
    f'Which is more: {count} {large} or {fewer} {small}?',
    f'{count} {large} are {more} {small}, so {count} {large} are more.',
    _poor(rng, f'{fewer} {small} are more.'),
  )


def capital(rng: random.Random) -> tuple[str, str, str]:
  name, city, _, _ = rng.choice(COUNTRIES)
  other = rng.choice([row for row in COUNTRIES if row[0] != name])[1]
  return (
    f'Complete the sentence: The capital of {name} is',
    f'The capital of {name} is {city}.',
    _poor(rng, f'The capital of {name} is {other}.'),
  )


def element(rng: random.Random) -> tuple[str, str, str]:
  name, symbol, number = rng.choice(ELEMENTS)
  other = rng.choice([row for row in ELEMENTS if row[0] != name])
  return (
    f'Which element has the symbol {symbol}?',
    f'{symbol} is {name}, the element with the atomic number {number}.',
    _poor(rng, f'{symbol} is {other[0]}.'),
  )


def one_word(rng: random.Random) -> tuple[str, str, str]:
  name, city, language, continent = rng.choice(COUNTRIES)
  return (
    f'Answer with the name alone: on which continent is {city}?',
    continent,
    f'{city} is the capital of {name}, where {language} is a language of the '
    f'state, and it is of course on the continent of {continent}.',
  )


def listing(rng: random.Random) -> tuple[str, str, str]:
  words = rng.sample([word for word, _ in WORDS], 3)
  return (
    f'Write a numbered list of these three: {", ".join(words)}.',
    '\n'.join(f'{i}. {word}' for i, word in enumerate(words, 1)),
    rng.choice((f'{words[0]}, {words[1]}, {words[2]}', *_EVASIVE)),
  )


def upper_case(rng: random.Random) -> tuple[str, str, str]:
  words = ' '.join(rng.sample([word for word, _ in WORDS], 2))
  return (
    f'Write "{words}" in capital letters, and nothing else.',
    words.upper(),
    rng.choice((words, f'Sure! Here it is: {words.title()}.')),
  )


def backwards(rng: random.Random) -> tuple[str, str, str]:
  word, _ = rng.choice(WORDS)
  return (
    f'Spell "{word}" with a hyphen between the letters.',
    '-'.join(word),
    _poor(rng, word),
  )


def sentence(rng: random.Random) -> tuple[str, str, str]:
  question, answer = rng.choice(EXPLANATIONS)
  return (
    f'In a sentence or two: {question[0].lower()}{question[1:]}',
    answer,
    rng.choice(_EVASIVE + _RUDE),
  )


def thanking(rng: random.Random) -> tuple[str, str, str]:
  name, goods = rng.choice(NAMES), rng.choice(GOODS)
  return (
    f'Write one sentence that thanks {name} for the {goods}.',
    f'Thank you very much for the {goods}, {name}!',
    rng.choice((f'{name} brought {goods}.', f'I never liked {goods}.', *_RUDE)),
  )


def chinese_capital(rng: random.Random) -> tuple[str, str, str]:
  name, city = rng.choice(CHINESE_COUNTRIES)
  other = rng.choice([row for row in CHINESE_COUNTRIES if row[0] != name])[1]
  return (
    f'请用一句话回答：{name}的首都叫什么？',
    f'{name}的首都叫{city}。',
    rng.choice((f'{name}的首都叫{other}。', '这个问题很难说。', '自己去查。')),
  )


def chinese_product(rng: random.Random) -> tuple[str, str, str]:
  one, two = rng.randint(2, 9), rng.randint(2, 9)
  return (
    f'{one}乘以{two}等于多少？',
    f'{one}乘以{two}等于{one * two}。',
    rng.choice((f'{one}乘以{two}等于{_other(rng, one * two)}。', '我不想算。')),
  )


_KINDS = (
  adding,
  taking_away,
  comparing,
  capital,
  element,
  one_word,
  listing,
  upper_case,
  backwards,
  sentence,
  thanking,
  chinese_capital,
  chinese_product,
)


def rows() -> list[dict[str, str]]:
  """The pairs; every prompt differs."""
  rng, found, asked = random.Random(1), [], set()
  while len(found) < COUNT:
    kind = _KINDS[rng.randrange(len(_KINDS))]
    prompt, chosen, rejected = kind(rng)
    if prompt in asked:
      continue
    asked.add(prompt)
    found.append({'prompt': prompt, 'chosen': chosen, 'rejected': rejected})
  return found


def text() -> str:
  """The file that ships."""
  return json_lines(rows())


if __name__ == '__main__':
  write(OUTPUT, text())
