# SPDX-License-Identifier: Apache-2.0
"""Generated package leaflets of invented medicines, and their extraction."""

import random
from collections.abc import Sequence
from typing import Annotated

import pydantic

from examples.knowledge_base.answer import support
from examples.knowledge_base.corpus import (
  Attribute,
  Corpus,
  Kind,
  generate,
  number,
)
from examples.knowledge_base.search import Hit, KnowledgeBase
from examples.knowledge_base.splitter import Passage
from moepeft.agent.chat_markers import escape_markers
from moepeft.agent.chat_model import ChatModel
from moepeft.agent.structured_output import ask_structured

LEAFLET = Kind(
  'medicine',
  {
    'ingredient': Attribute(
      ('The active substance is {value}.', '{it} contains {value}.'),
      ('What is in {name}?', 'Which substance makes {name} work?'),
      lambda rng: (
        rng.choice('brav cort dul fen lem pax'.split())
        + rng.choice('anol idine oxan uprin'.split())
      ),
    ),
    'dose': Attribute(
      (
        'Adults take {value} with a glass of water.',
        'The usual dose is {value}.',
      ),
      ('How much {name} is taken?', 'What is the dosage of {name}?'),
      lambda rng: (
        f'{rng.choice(["one tablet", "two tablets", "10 ml"])} '
        f'{rng.choice(["in the morning", "in the evening", "every 8 hours"])}'
      ),
    ),
    'maximum': Attribute(
      (
        'Never take more than {value} a day.',
        'Within 24 hours, {value} must not be exceeded.',
      ),
      ('What is the daily limit of {name}?', 'How much {name} is too much?'),
      number(2, 12, 'tablets'),
    ),
    'age': Attribute(
      (
        '{it} is not for children under {value}.',
        'Younger patients than {value} must not be given it.',
      ),
      (
        'From what age may {name} be used?',
        'How old must a user of {name} be?',
      ),
      number(2, 16, 'years'),
    ),
    'interaction': Attribute(
      (
        'It must not be combined with {value}.',
        '{it} is weakened by {value}.',
      ),
      (
        'What does {name} not go together with?',
        'What interferes with {name}?',
      ),
      ('alcohol', 'grapefruit juice', 'milk', 'iron tablets', 'antacids'),
    ),
    'side_effect': Attribute(
      (
        'One patient in ten gets {value}.',
        'Its most frequent unwanted effect is {value}.',
      ),
      ('What are side effects of {name}?', 'What may {name} cause?'),
      ('a dry mouth', 'a headache', 'drowsiness', 'a rash', 'nausea'),
    ),
    'storage': Attribute(
      ('Keep it {value}.', '{it} is stored {value}.'),
      ('Where should {name} be kept?', 'How is {name} stored?'),
      ('in the refrigerator', 'below 25 degrees', 'away from light'),
    ),
    'opened': Attribute(
      (
        'Once opened, it can be used for {value}.',
        'An open pack is thrown away after {value}.',
      ),
      ('How long does open {name} last?', 'When does open {name} go bad?'),
      number(2, 11, 'weeks'),
    ),
  },
  (
    'Read all of this leaflet carefully before use.',
    'Keep the leaflet, as it may be needed again.',
    'The pack has a seal that shows whether it was opened.',
    'It was made for one person and is not passed on to others.',
    'Similar medicines, such as {other}, have leaflets of their own.',
    'Old packs are returned to a pharmacy.',
    'The letters on the tablet have no meaning.',
  ),
)
_NAMES = 'Alvi Bexo Cori Dela Emba Flu Gasta Hepa Iso Kala'
_ENDINGS = 'dol fen lin mox nil pram quel tan'


def leaflets(count: int, seed: int) -> Corpus:
  """Leaflets of invented medicines, with questions.

  Raises:
    ValueError: there are fewer names.
  """
  pairs = [f'{a}{b}' for a in _NAMES.split() for b in _ENDINGS.split()]
  if count > len(pairs):
    raise ValueError(f'there are {len(pairs)} names of medicines, not {count}')
  random.Random(seed).shuffle(pairs)
  return generate(LEAFLET, pairs[:count], seed)


# Passages among which those of a medicine are looked for.
_CANDIDATES = 30
# Bounded, so that the JSON comes to its end.
_Text = Annotated[str, pydantic.Field(max_length=60)]


class LeafletBase(KnowledgeBase):
  """A knowledge base that returns leaflets of a question's medicines alone.

  The nearest sentence may be of another medicine, above all where the right
  leaflet does not say it.
  """

  def search(self, queries: str | Sequence[str], k: int) -> list[Hit]:
    question = queries if isinstance(queries, str) else queries[0]
    hits = super().search(queries, _CANDIDATES)
    return [
      hit
      for hit in hits
      if hit.passage.title.split()[-1].lower() in question.lower()
    ][:k]


class Leaflet(pydantic.BaseModel):
  """Fields of a leaflet; '' for what it does not say."""

  ingredient: _Text
  dose: _Text
  maximum: _Text
  age: _Text
  interaction: _Text
  side_effect: _Text
  storage: _Text
  opened: _Text


_EXTRACT = (
  'Copy the fields of this package leaflet, with its words: ingredient (the '
  'active substance), dose, maximum (per day), age (the youngest), interaction '
  '(what it must not be combined with), side_effect, storage, opened (for how '
  'long an open pack is used). A field that is not in the leaflet is empty.'
)


def extract(model: ChatModel, title: str, text: str) -> Leaflet:
  """The fields of a leaflet that its text supports; others are empty."""
  passage = Passage('', title, text)
  leaflet = ask_structured(
    model,
    Leaflet,
    [
      {'role': 'system', 'content': _EXTRACT},
      {'role': 'user', 'content': escape_markers(passage.indexed)},
    ],
    1,
    {'temperature': 0, 'max_tokens': 300},
  )
  return Leaflet(
    **{
      name: value if support(value, '', [passage]) == 1 else ''
      for name, value in leaflet
    }
  )
