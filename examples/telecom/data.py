# SPDX-License-Identifier: Apache-2.0
"""Writes training pairs for the adapter.

  python -m examples.telecom.data --output=workdirs/telecom.jsonl

Tariffs change every year, so they are in documents. An adapter learns to read
an answer from passages, among them some that do not have it (RAFT, Zhang et
al., 2024), with the tariffs of another year than the one that is asked for.
The codes of routers do not change, and are in no document: it learns these.
"""

import argparse
import json
import pathlib
import random
from collections.abc import Iterator, Sequence

from examples.knowledge_base import client as client_lib
from examples.knowledge_base.corpus import (
  Attribute,
  Corpus,
  Kind,
  Question,
  generate,
  number,
)

YEARS = {'training': 1, 'current': 2}
TARIFF = Kind(
  'tariff',
  {
    'fee': Attribute(
      ('{it} costs {value} a month.', 'The monthly fee is {value}.'),
      ('How expensive is {name}?', 'What do I pay every month for {name}?'),
      number(6, 89, 'euros'),
    ),
    'volume': Attribute(
      ('{it} includes {value} of data.', '{value} can be used each month.'),
      ('How much data is in {name}?', 'What is the data limit of {name}?'),
      number(2, 95, 'GB'),
    ),
    'term': Attribute(
      ('The contract runs for {value}.', '{it} has a term of {value}.'),
      ('How long am I bound to {name}?', 'What is the minimum term of {name}?'),
      number(1, 36, 'months'),
    ),
    'notice': Attribute(
      ('It is cancelled with {value} of notice.', 'The notice is {value}.'),
      ('How early must I cancel {name}?', 'When do I have to end {name}?'),
      number(2, 80, 'days'),
    ),
    'speed': Attribute(
      ('Downloads reach {value}.', '{it} gives up to {value}.'),
      ('How fast is {name}?', 'What bandwidth has {name}?'),
      number(10, 990, 'Mbit/s'),
    ),
    'activation': Attribute(
      ('Activation costs {value} once.', 'The setup fee is {value}.'),
      (
        'What is the cost to start {name}?',
        'What do I pay at once for {name}?',
      ),
      number(3, 49, 'euros'),
    ),
  },
  (
    'It can be ordered in every shop and online.',
    'Customers of {other} can change to it without a fee.',
    'The bill is sent by e-mail at the end of the month.',
    'Emergency calls are always free.',
    'Compare it with {other} before you order.',
  ),
)
_FIRST = 'Sky Blue Giga Easy Home Pro Rapid Smart Ultra Way'.split()
_SECOND = 'Talk Surf Flat Line Max Net Plus Start'.split()
# What a code of a router means: in no document, the same every year.
CODES = {
  'A11': 'pull the plug for one minute',
  'A27': 'replace the grey cable',
  'B03': 'enter the PIN of the SIM card',
  'B45': 'wait until the update ends',
  'C18': 'move the router to a window',
  'C62': 'press the reset button with a pin',
  'D09': 'order a technician',
  'D74': 'switch off the old router',
  'E31': 'choose another WiFi channel',
  'E56': 'let the router cool down',
}
_CODE_QUESTIONS = (
  'My router shows the code {code}.',
  'What do I do about {code}?',
  'The display says {code}, help!',
  'Error {code} again. What now?',
)
HELD_OUT_CODE_QUESTION = 'There is a {code} on my box. What should I do?'


def tariffs(year: str, count: int = 40) -> Corpus:
  """The tariffs of a year: the names are the same, the facts are not."""
  names = [f'{a}{b}' for a in _FIRST for b in _SECOND]
  random.Random(0).shuffle(names)
  return generate(TARIFF, names[:count], YEARS[year])


def prompt(question: str, passages: Sequence[str]) -> str:
  """The user's turn, with passages or without any."""
  if not passages:
    return question
  return '\n\n'.join([*passages, f'Question: {question}'])


def reply(answer: str) -> str:
  """The answer in the house's style."""
  return f'Gladly: {answer}.'


def code_questions(templates: Sequence[str]) -> Iterator[Question]:
  for code, answer in CODES.items():
    for template in templates:
      yield Question(template.format(code=code), answer)


def pairs(count: int, seed: int) -> Iterator[tuple[str, str]]:
  """Training pairs (prompt, answer): tariffs with passages, and codes."""
  rng = random.Random(seed)
  corpus = tariffs('training')
  known = [question for question in corpus.questions if question.answer]
  codes = list(code_questions(_CODE_QUESTIONS))
  for i in range(count):
    if i % 2:
      question = rng.choice(codes)
      passages = [_passage(rng.choice(known))] * rng.randint(0, 1)
    else:
      question = rng.choice(known)
      passages = [_passage(question), _passage(rng.choice(known))]
      rng.shuffle(passages)
    yield prompt(question.text, passages), reply(question.answer)


def _passage(question: Question) -> str:
  return f'Tariff {question.subject}\n{question.sentence}'


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    'python -m examples.telecom.data',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--output', required=True, help='A file, .jsonl.')
  parser.add_argument('--pairs', type=int, default=600)
  flags = parser.parse_args(argv)
  path = pathlib.Path(flags.output)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', encoding='utf-8') as file:
    for text, answer in pairs(flags.pairs, seed=0):
      messages = [
        {'role': 'user', 'content': text},
        {'role': 'assistant', 'content': answer},
      ]
      print(json.dumps({'messages': messages}), file=file)
  print(f'{flags.pairs} pairs in {path}')


if __name__ == '__main__':
  client_lib.run(main)
