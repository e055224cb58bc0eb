# SPDX-License-Identifier: Apache-2.0
"""Generates documents on invented subjects, with questions of known answers.

  python -m examples.knowledge_base.corpus --output=DIR --documents=60

Questions are worded otherwise than the documents. A document lacks a quarter of
the attributes of its kind, so that there are questions without an answer, and
most sentences speak of 'it', so that a passage needs its title.
"""

import dataclasses
import html
import json
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence

from moepeft.agent.flags import command_parser

Values = Sequence[str] | Callable[[random.Random], str]


@dataclasses.dataclass(frozen=True)
class Attribute:
  """A fact that documents of a kind have.

  Attributes:
    statements: sentences with {it} and {value}.
    questions: with {name}, in other words than the statements.
    values: to choose from, or a function.
  """

  statements: Sequence[str]
  questions: Sequence[str]
  values: Values


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of documents.

  Attributes:
    noun: 'station' for documents on stations.
    attributes: {name: attribute}.
    fillers: sentences without a fact, with {it} or {other}.
  """

  noun: str
  attributes: Mapping[str, Attribute]
  fillers: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, and the place of its answer.

  Attributes:
    answer: the value; '' if no document has it.
    sentence: the sentence with the value.
    source: the file.
    subject: the name that the question is on.
  """

  text: str
  answer: str = ''
  sentence: str = ''
  source: str = ''
  subject: str = ''


@dataclasses.dataclass(frozen=True)
class Corpus:
  """{file: text}, the facts {subject: {attribute: value}}, and questions."""

  files: Mapping[str, str]
  facts: Mapping[str, Mapping[str, str]]
  questions: Sequence[Question]

  def write(self, folder: pathlib.Path) -> None:
    """Writes the documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in self.files.items():
      (folder / name).write_text(text, encoding='utf-8')

  def sample(self, answerable: bool, count: int, seed: int) -> list[Question]:
    """Questions with or without an answer, in a random order."""
    chosen = [q for q in self.questions if bool(q.answer) == answerable]
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


_STARTS = 'Bal Cor Dren Fel Gar Hol Jar Kel Lum Mar Nor Or Pel Quin Ros Sel'
_ENDS = 'anda avik ember enik esko ildur imar ona orra ovel uma unde ushka ytte'


def names(count: int, rng: random.Random) -> list[str]:
  """Invented names; many begin or end as others do."""
  pairs = [f'{a}{b}' for a in _STARTS.split() for b in _ENDS.split()]
  rng.shuffle(pairs)
  if count > len(pairs):
    raise ValueError(f'there are {len(pairs)} names, not {count}')
  return pairs[:count]


def generate(
  kind: Kind, subjects: Sequence[str], seed: int, lacking: float = 0.25
) -> Corpus:
  """Generates a document for each subject."""
  rng = random.Random(seed)
  texts, facts, questions = {}, {}, []
  for number, name in enumerate(subjects):
    source = f'{name.lower()}{(".md", ".txt", ".html")[number % 3]}'
    facts[name], lines = {}, []
    for key, attribute in kind.attributes.items():
      question = rng.choice(attribute.questions).format(name=name)
      if rng.random() < lacking:
        questions.append(Question(question, subject=name))
        continue
      values = attribute.values
      value = values(rng) if callable(values) else rng.choice(values)
      subject = rng.choice(['It', 'It', f'The {kind.noun}', name])
      sentence = rng.choice(attribute.statements).format(
        it=subject, value=value
      )
      facts[name][key] = value
      lines.append(sentence)
      questions.append(Question(question, value, sentence, source, name))
    neighbours = [n for n in subjects if n != name] or [name]
    for filler in rng.sample(kind.fillers, min(len(lines), len(kind.fillers))):
      subject = rng.choice(['It', f'The {kind.noun}'])
      lines.append(filler.format(it=subject, other=rng.choice(neighbours)))
    rng.shuffle(lines)
    texts[source] = _render(source, f'{kind.noun.capitalize()} {name}', lines)
  return Corpus(texts, facts, questions)


def merge(*corpora: Corpus) -> Corpus:
  """One corpus with the documents and questions of all."""
  return Corpus(
    {name: text for c in corpora for name, text in c.files.items()},
    {name: facts for c in corpora for name, facts in c.facts.items()},
    [question for c in corpora for question in c.questions],
  )


def _render(source: str, title: str, lines: Sequence[str]) -> str:
  """A document of paragraphs of four sentences, in its file's format."""
  paragraphs = [' '.join(lines[i : i + 4]) for i in range(0, len(lines), 4)]
  if source.endswith('.html'):
    body = ''.join(f'<p>{html.escape(p)}</p>\n' for p in paragraphs)
    head = f'<head><title>{title}</title></head>'
    return f'<html>{head}<body><h1>{title}</h1>\n{body}</body></html>\n'
  return '\n\n'.join([f'# {title}', *paragraphs]) + '\n'


def _person(rng: random.Random) -> str:
  first = rng.choice('Ada Ben Carla Dov Eva Farid Gita Hugo Ines Jonas'.split())
  last = rng.choice('Abel Brandt Costa Dubois Egger Falk Grau Hess'.split())
  return f'{first} {last}'


def number(low: int, high: int, unit: str = '') -> Callable:
  """A function that draws a number with its unit."""
  return lambda rng: f'{rng.randint(low, high)}{unit and " " + unit}'


STATION = Kind(
  'station',
  {
    'founded': Attribute(
      ('{it} was opened in {value}.', '{it} has been in use since {value}.'),
      ('In which year did {name} start?', 'How old is station {name}?'),
      number(1921, 2015),
    ),
    'leader': Attribute(
      ('{it} is directed by {value}.', 'The head of the team is {value}.'),
      ('Who is in charge of {name}?', 'Who leads the people at {name}?'),
      _person,
    ),
    'height': Attribute(
      ('{it} lies {value} above the sea.', '{it} stands at {value}.'),
      ('What is the elevation of {name}?', 'How high up is {name}?'),
      number(310, 4890, 'm'),
    ),
    'power': Attribute(
      ('Its electricity comes from {value}.', '{it} is powered by {value}.'),
      ('Where does {name} get its energy?', 'What supplies {name} with power?'),
      ('wind turbines', 'solar panels', 'a diesel generator', 'a small dam'),
    ),
    'beds': Attribute(
      ('{it} can house {value} over the winter.', 'There is room for {value}.'),
      ('How many can sleep at {name}?', 'What is the capacity of {name}?'),
      number(6, 98, 'people'),
    ),
    'subject': Attribute(
      (
        'Its main subject is {value}.',
        'Most of its instruments are for {value}.',
      ),
      ('What is studied at {name}?', 'What field does {name} work in?'),
      ('glaciers', 'lichens', 'earthquakes', 'cosmic rays', 'bird migration'),
    ),
    'call_sign': Attribute(
      ('{it} answers to {value} on the radio.', 'The call sign is {value}.'),
      ('How is {name} addressed by radio?', 'What is the call sign of {name}?'),
      lambda rng: f'{rng.choice("KLMR")}{rng.randint(100, 999)}',
    ),
    'water': Attribute(
      (
        'Drinking water is taken from {value}.',
        '{it} draws water from {value}.',
      ),
      (
        'What do people at {name} drink?',
        'What is the water supply of {name}?',
      ),
      ('a spring', 'melted snow', 'a deep well', 'a lake nearby'),
    ),
    'closed': Attribute(
      (
        'The road to it is shut in {value}.',
        '{it} cannot be reached in {value}.',
      ),
      (
        'When is there no access to {name}?',
        'In what month is {name} cut off?',
      ),
      ('January', 'February', 'March', 'November', 'December'),
    ),
    'cost': Attribute(
      ('A year of work there costs {value}.', 'Its yearly budget is {value}.'),
      ('How much money does {name} need?', 'What is spent on {name} per year?'),
      number(110, 990, 'thousand crowns'),
    ),
  },
  (
    'Visitors often compare it with {other}.',
    'The first hut of the site burned down and was built anew.',
    'Samples are packed by hand and sent south twice a year.',
    'A small library keeps the diaries of the early teams.',
    'Letters from {other} arrive with the mail sledge.',
    '{it} keeps a spare set of every tool in a shed.',
    'The kitchen is the warmest part of the building.',
    'In good weather the hills behind {other} can be seen.',
    'Cooks change every season, and each brings recipes.',
    'The crew measures the wind each morning before breakfast.',
    '{it} took part in a joint campaign with {other}.',
    'Boots are dried on a rack beside the stove.',
  ),
)
SHIP = Kind(
  'ship',
  {
    'harbour': Attribute(
      ('{it} is based in the harbour of {value}.', 'Her home port is {value}.'),
      ('Where does the ship {name} lie at anchor?', 'Where is {name} at home?'),
      ('Aldersund', 'Brenholm', 'Crestwick', 'Dunmere', 'Eastvig'),
    ),
    'captain': Attribute(
      ('{it} sails under {value}.', 'Her captain is {value}.'),
      ('Who commands the ship {name}?', 'Who steers {name}?'),
      _person,
    ),
    'load': Attribute(
      ('{it} carries {value} of freight.', 'Her holds take {value}.'),
      ('How much cargo fits into {name}?', 'What can {name} transport?'),
      number(100, 900, 'tonnes'),
    ),
  },
  ('Her hull was painted red last year.', 'The crew has a dog aboard.'),
)


def stations(count: int, seed: int) -> Corpus:
  """Stations, a ship for each four, and questions over both.

  A question such as 'Where is the ship at home that supplies Balanda?' needs
  the documents of the station and of its ship.
  """
  rng = random.Random(seed)
  ships = -(-count // 4)
  subjects = names(count + ships, rng)
  fleet = generate(SHIP, subjects[count:], seed + 1, lacking=0.0)
  base = generate(STATION, subjects[:count], seed)
  files, questions = dict(base.files), []
  facts = {name: dict(values) for name, values in base.facts.items()}
  for i, (source, name) in enumerate(zip(base.files, facts, strict=True)):
    ship = subjects[count + i % ships]
    facts[name]['ship'] = ship
    line = f'Food and fuel are brought by the ship {ship}.'
    end = '</body>' if source.endswith('.html') else ''
    text = f'<p>{line}</p>\n{end}' if end else f'\n{line}\n'
    files[source] = (
      files[source].replace(end, text) if end else files[source] + text
    )
    questions.append(
      Question(f'What brings supplies to {name}?', ship, line, source, name)
    )
  linked = dataclasses.replace(
    base, files=files, facts=facts, questions=[*base.questions, *questions]
  )
  return merge(linked, fleet)


def two_hops(corpus: Corpus) -> list[Question]:
  """Questions on the ship of a station, which name the station alone."""
  questions = []
  for name, facts in corpus.facts.items():
    if ship := facts.get('ship'):
      harbour = corpus.facts[ship]['harbour']
      home = next(
        question
        for question in corpus.questions
        if (question.subject, question.answer) == (ship, harbour)
      )
      text = f'In which harbour is the ship based that supplies {name}?'
      questions.append(dataclasses.replace(home, text=text, subject=name))
  return questions


def main(argv: Sequence[str] | None = None) -> None:
  """Writes a corpus, and its questions as JSON lines."""
  parser = command_parser('examples.knowledge_base.corpus', __doc__)
  parser.add_argument('--output', required=True, help='The folder to write.')
  parser.add_argument('--documents', type=int, default=60, help='Stations.')
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args(argv)
  corpus = stations(flags.documents, flags.seed)
  folder = pathlib.Path(flags.output)
  corpus.write(folder)
  with open(folder / 'questions.jsonl', 'w', encoding='utf-8') as file:
    for question in [*corpus.questions, *two_hops(corpus)]:
      print(json.dumps(dataclasses.asdict(question)), file=file)
  print(f'{len(corpus.files)} documents in {folder}')


if __name__ == '__main__':
  main()
