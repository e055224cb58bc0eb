# SPDX-License-Identifier: Apache-2.0
"""Short texts in thousands of wordings, for a model of a million parameters.

A form such as '[One|Each] NAME [earns|yields] VALUE' stands for one sentence of
each choice. The sentence forms of a text say its products, its limit and its
question; a fifth of each is held out, whose words stand in others. Words in
capitals are filled in: the names and numbers of production, covering and
knapsack with one resource.
"""

import functools
import itertools
import re
import zlib
from collections.abc import Iterator

from examples.or_agents.wording import Template
from moepeft.tasks.stable_random import StableRandom

FAMILIES = ('production', 'covering', 'knapsack')
# One form in so many is held out.
_HELD_OUT_DIVISOR = 5
# In the order of FAMILIES.
_JINJA = {
  'ITEMS': ('items', 'items', 'items'),
  'NAME': ('i.name', 'i.name', 'i.name'),
  'VALUE': ('i.profit', 'i.cost', 'i.value'),
  'USE': (
    'i.uses.values() | first',
    'i.holds.values() | first',
    'i.weight',
  ),
  'THING': ('resources[0].name', 'contents[0].name', '"kg"'),
  'LIMIT': ('resources[0].limit', 'contents[0].need', 'capacity'),
  'PARTS': (
    '"units" if whole else "fractions"',
    '"units" if whole else "fractions"',
    '"pieces"',
  ),
}
_WORDS = {
  'GAINS': (
    '[earns|brings in|yields|has a profit of]',
    '[costs|is sold for|is priced at|has a cost of]',
    '[is worth|counts|adds|has a value of]',
  ),
  'TAKES': (
    '[takes|needs|uses|consumes]',
    '[holds|gives|contains|packs]',
    '[weighs|has|takes|comes to]',
  ),
  'NOUN': ('profit', 'cost', 'value'),
  'HAVE': (
    '[There is|We have|The stock is]',
    '[We need|There must be|The order is for]',
    '[We can load|There is room for|The limit is]',
  ),
  'AIM': ('Maximize', 'Minimize', 'Maximize'),
  'BEST': ('[largest|highest]', '[smallest|lowest]', '[largest|highest]'),
}
_FORMS = {
  'items': (
    '[One|Each|Every] NAME GAINS VALUE and TAKES USE THING.',
    '[One|Each|Every] NAME TAKES USE THING and GAINS VALUE.',
    'With USE THING [one|each|every] NAME GAINS VALUE.',
    '[For|At] a NOUN of VALUE [one|each|every] NAME TAKES USE THING.',
    '[|The ]NAME: NOUN[| of| is] VALUE, THING[| is] USE.',
    '[|The ]NAME: THING[| is] USE, NOUN[| of| is] VALUE.',
  ),
  'limit': ('HAVE LIMIT THING[| in all].',),
  'question': (
    'AIM the NOUN [in|with] PARTS.',
    'Find the BEST NOUN [in|with] PARTS.',
    'What is the BEST NOUN [in|with] PARTS?',
  ),
}
_CHOICE = re.compile(r'\[([^\[\]]*)\]')
_CAPITALS = re.compile(r'\b[A-Z]{3,}\b')


def draw_template(rng: StableRandom, family: str, held_out: bool) -> Template:
  """Draws a template, from the forms that are held out or from the rest."""
  parts = {}
  numbers = []
  for kind in _FORMS:
    choices = forms(family, kind, held_out)
    number = rng.randbelow(len(choices))
    numbers.append(str(number))
    text = _CAPITALS.sub(
      lambda match: f'{{{{ {_JINJA[match[0]][FAMILIES.index(family)]} }}}}',
      choices[number],
    )
    if kind == 'items':
      text = f'{{% for i in items %}}{text} {{% endfor %}}'
    parts[kind] = text
  order = rng.shuffled(list(parts))
  name = f'{"".join(kind[0] for kind in order)}/{".".join(numbers)}'
  return Template(
    ('held_out/' if held_out else '') + name,
    tuple(parts[kind] for kind in order),
  )


@functools.cache
def forms(family: str, kind: str, held_out: bool) -> tuple[str, ...]:
  """The sentence forms of a kind that are held out, or the rest."""
  index = FAMILIES.index(family)
  texts = []
  for form in _FORMS[kind]:
    for word, by_family in _WORDS.items():
      form = re.sub(rf'\b{word}\b', by_family[index], form)
    texts += _expand(form)
  texts.sort(key=lambda text: zlib.crc32(text.encode()))
  first = len(texts) // _HELD_OUT_DIVISOR
  return tuple(texts[:first] if held_out else texts[first:])


def _expand(form: str) -> Iterator[str]:
  """'[a|b] c' -> 'a c', 'b c'."""
  pieces = _CHOICE.split(form)
  for chosen in itertools.product(*(piece.split('|') for piece in pieces)):
    yield ''.join(chosen)
