# SPDX-License-Identifier: Apache-2.0
"""Writes training pairs for the adapter.

  python -m examples.telecom.data --output=workdirs/telecom.jsonl

Tariffs change every year, so they are in documents. An adapter learns to read
an answer from passages, one of which does not have it (RAFT, Zhang et al.,
2024), with the tariffs of other years than the one that is asked for. The codes
of routers do not change, and are in no document: it learns these.
"""

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
from examples.knowledge_base.splitter import Passage
from moepeft.agent.flags import command_parser

CURRENT_YEAR, TRAINING_YEARS = 0, range(1, 21)
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
# The meaning of a router's code: in no document, the same every year.
CODES = {
  'A11': 'pull the plug',
  'A27': 'replace the cable',
  'B03': 'enter the PIN',
  'B45': 'wait an hour',
  'C18': 'move the router',
  'C62': 'press reset',
  'D09': 'call a technician',
  'D74': 'remove the old box',
  'E31': 'change the channel',
  'E56': 'let it cool down',
}
_CODE_QUESTIONS = (
  'My router shows the code {code}.',
  'What do I do about {code}?',
  'The display says {code}, help!',
  'Error {code} again. What now?',
)
HELD_OUT_CODE_QUESTION = 'There is a {code} on my box. What should I do?'


def tariffs(year: int, count: int = 40) -> Corpus:
  """The tariffs of a year: the names are the same, the facts are not."""
  names = [f'{a}{b}' for a in _FIRST for b in _SECOND]
  random.Random(0).shuffle(names)
  return generate(TARIFF, names[:count], year)


def prompt(question: str, passages: Sequence[Passage]) -> str:
  """The question after passages, or alone."""
  texts = [' '.join(passage.indexed.split()) for passage in passages]
  return ' '.join([*texts, question])


def code_questions(templates: Sequence[str]) -> list[Question]:
  return [
    Question(template.format(code=code), answer)
    for code, answer in CODES.items()
    for template in templates
  ]


def pairs(count: int, seed: int) -> Iterator[tuple[str, str]]:
  """Training pairs: every other on a tariff, with passages, or on a code.

  The passage that does not help is on another tariff or another attribute. A
  question on a code has two such passages or none.
  """
  rng = random.Random(seed)
  codes = code_questions(_CODE_QUESTIONS)
  years = [
    [question for question in tariffs(year).questions if question.answer]
    for year in TRAINING_YEARS
  ]
  for i in range(count):
    questions = rng.choice(years)
    question = rng.choice(questions)
    same = [q for q in questions if q.subject == question.subject]
    useless = rng.choice(rng.choice([questions, same]))
    passages = [_passage(question), _passage(useless)]
    rng.shuffle(passages)
    if i % 2:
      question = rng.choice(codes)
      passages = rng.choice([passages, []])
    yield prompt(question.text, passages), question.answer


def _passage(question: Question) -> Passage:
  title = f'Tariff {question.subject}'
  return Passage(question.source, title, question.sentence)


def main(argv: Sequence[str] | None = None) -> None:
  parser = command_parser('examples.telecom.data', __doc__)
  parser.add_argument('--output', required=True, help='A file, .jsonl.')
  parser.add_argument('--pairs', type=int, default=20_000)
  flags = parser.parse_args(argv)
  path = pathlib.Path(flags.output)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', encoding='utf-8') as file:
    for inputs, targets in pairs(flags.pairs, seed=0):
      print(json.dumps({'inputs': inputs, 'targets': targets}), file=file)
  print(f'{flags.pairs} pairs in {path}')


if __name__ == '__main__':
  client_lib.run(main)
