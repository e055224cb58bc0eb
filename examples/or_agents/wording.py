# SPDX-License-Identifier: Apache-2.0
"""Templates that put an instance's fields into words, with tables too.

A template is an opening, a body with the numbers, and a question, in one of
two orders; each piece is a Jinja text. Pieces of held-out templates stand in no
template that is trained on, so that no sentence of theirs is in training.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from examples.or_agents.domains import Domain
from moepeft.tasks.stable_random import StableRandom

_NUMBER = re.compile(r'\d+(?:\.\d+)?')
ORDERS = ('obq', 'qob')


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Interchangeable parts of a family's templates.

  Attributes:
    openings: who plans, and between which names.
    bodies: all numbers, as sentences or as tables.
    questions: the aim, and whether fractions count.
  """

  openings: tuple[str, ...]
  bodies: tuple[str, ...]
  questions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Template:
  """One way to put a family into words.

  Attributes:
    name: 'obq/1.0.2', the order and the index of each piece; held-out
      templates begin with 'held_out/'.
    pieces: Jinja texts in the order of the text.
  """

  name: str
  pieces: tuple[str, ...]

  def render(self, fields: dict[str, Any], domain: Domain) -> str:
    """Returns the text, without spaces at line ends."""
    parts = [
      _compiled(piece).render(actor=domain.actor, **fields).strip()
      for piece in self.pieces
    ]
    text = parts[0]
    for before, part in itertools.pairwise(parts):
      # Tables have lines of their own.
      text += ('\n' if '\n' in before + part else ' ') + part
    return text


def templates(family: str, held_out: bool) -> tuple[Template, ...]:
  """All templates of a family that are trained on, or those held out."""
  return _templates(family, held_out)


def draw_template(rng: StableRandom, family: str, held_out: bool) -> Template:
  """One of `templates`."""
  return rng.choice(templates(family, held_out))


def numbers_in(text: str) -> list[float]:
  """The numbers of a text in order."""
  return [float(number) for number in _NUMBER.findall(text)]


def numbers_of(fields: Any) -> Iterator[float]:
  """The numbers of nested fields, without truth values."""
  if isinstance(fields, dict):
    fields = list(fields.values())
  if isinstance(fields, list):
    for field in fields:
      yield from numbers_of(field)
  elif isinstance(fields, int | float) and not isinstance(fields, bool):
    yield float(fields)


def join_words(words: Sequence[str]) -> str:
  """'a', 'a and b', 'a, b and c'."""
  *front, last = words
  return f'{", ".join(front)} and {last}' if front else last


@functools.cache
def _templates(family: str, held_out: bool) -> tuple[Template, ...]:
  pieces = WORDINGS[family][held_out]
  choices = itertools.product(
    ORDERS,
    enumerate(pieces.openings),
    enumerate(pieces.bodies),
    enumerate(pieces.questions),
  )
  result = []
  for order, opening, body, question in choices:
    parts = {'o': opening[1], 'b': body[1], 'q': question[1]}
    name = f'{order}/{opening[0]}.{body[0]}.{question[0]}'
    result.append(
      Template(
        ('held_out/' if held_out else '') + name,
        tuple(parts[letter] for letter in order),
      )
    )
  return tuple(result)


@functools.cache
def _compiled(piece: str) -> jinja2.Template:
  return _ENVIRONMENT.from_string(piece)


_ENVIRONMENT = jinja2.Environment(
  undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters['words'] = join_words
_ENVIRONMENT.filters['names'] = lambda entries: [e['name'] for e in entries]

# {family: (pieces of templates that are trained on, those of held-out ones)}
WORDINGS: dict[str, tuple[Pieces, Pieces]] = {
  'production': (
    Pieces(
      (
        'A {{ actor }} makes {{ items | names | words }}.',
        'The output of a {{ actor }} has to be planned: '
        '{{ items | names | words }}.',
        'A {{ actor }} decides on quantities of {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}'
        'One {{ i.name }} earns {{ i.profit }} and takes '
        '{% for r, n in i.uses.items() %}'
        '{{ n }} {{ r }}{{ ", " if not loop.last }}{% endfor %}'
        '{% if i.lower %}, with at least {{ i.lower }} to be made'
        '{% endif %}'
        '{% if i.upper %}, with at most {{ i.upper }} to be sold{% endif %}'
        '. {% endfor %}'
        '{% for r in resources %}There is {{ r.limit }} {{ r.name }}. '
        '{% endfor %}',
        'Stock: {% for r in resources %}{{ r.limit }} {{ r.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        '{% for i in items %}'
        'A unit of {{ i.name }} needs '
        '{% for r, n in i.uses.items() %}{{ n }} {{ r }}, {% endfor %}'
        'and its profit is {{ i.profit }}'
        '{% if i.lower %}; the least amount is {{ i.lower }}{% endif %}'
        '{% if i.upper %}; the largest amount is {{ i.upper }}{% endif %}'
        '. {% endfor %}',
        '| product | profit |'
        '{% for r in resources %} {{ r.name }} |{% endfor %} min | max |\n'
        '{% for i in items %}| {{ i.name }} | {{ i.profit }} |'
        '{% for r in resources %} {{ i.uses.get(r.name, "-") }} |{% endfor %}'
        ' {{ i.lower or "-" }} | {{ i.upper or "-" }} |\n'
        '{% endfor %}| limit | |'
        '{% for r in resources %} {{ r.limit }} |{% endfor %} | |',
        'Profits are {% for i in items %}{{ i.profit }} for {{ i.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        '{% for r in resources %}'
        'The {{ r.limit }} {{ r.name }} on hand must do'
        '{% for i in items if r.name in i.uses %}'
        '{{ ": " if loop.first else ", " }}'
        'each {{ i.name }} uses {{ i.uses[r.name] }}{% endfor %}. '
        '{% endfor %}'
        '{% for i in items %}'
        '{% if i.lower %}Orders for {{ i.lower }} {{ i.name }} are binding. '
        '{% endif %}'
        '{% if i.upper %}No more than {{ i.upper }} {{ i.name }} can be '
        'placed. {% endif %}{% endfor %}',
        '{% for i in items %}'
        '{{ i.name }}: profit {{ i.profit }}'
        '{% for r, n in i.uses.items() %}, {{ r }} {{ n }}{% endfor %}'
        '{% if i.lower %}, minimum {{ i.lower }}{% endif %}'
        '{% if i.upper %}, maximum {{ i.upper }}{% endif %}. '
        '{% endfor %}'
        'Limits: {% for r in resources %}{{ r.name }} {{ r.limit }}'
        '{{ ", " if not loop.last }}{% endfor %}.',
      ),
      (
        'Maximize the profit; '
        '{{ "only whole units count" if whole else "parts of units count" }}.',
        'Find the largest profit, with '
        '{{ "whole numbers of units" if whole else "fractions allowed" }}.',
        '{{ "In whole units" if whole else "With any fractions" }}, what '
        'is the highest profit?',
      ),
    ),
    Pieces(
      (
        'We run a {{ actor }} and can produce {{ items | names | words }}.',
        'Our {{ actor }} offers {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}'
        'Every {{ i.name }} brings in {{ i.profit }} and consumes '
        '{% for r, n in i.uses.items() %}'
        '{{ n }} of {{ r }}{{ ", " if not loop.last }}{% endfor %}'
        '{% if i.lower %}, and no fewer than {{ i.lower }} are promised'
        '{% endif %}'
        '{% if i.upper %}, and demand ends at {{ i.upper }}{% endif %}'
        '. {% endfor %}'
        'We have {% for r in resources %}{{ r.limit }} of {{ r.name }}'
        '{{ ", " if not loop.last }}{% endfor %}.',
        'item;gain;{{ resources | names | join(";") }};from;to\n'
        '{% for i in items %}{{ i.name }};{{ i.profit }}'
        '{% for r in resources %};{{ i.uses.get(r.name, "") }}{% endfor %}'
        ';{{ i.lower or "" }};{{ i.upper or "" }}\n'
        '{% endfor %}available;'
        '{% for r in resources %};{{ r.limit }}{% endfor %};;',
      ),
      (
        'How much can be gained at best'
        '{{ ", in complete pieces" if whole else ", pieces being divisible" }}'
        '?',
        'Choose the amounts ({{ "integers" if whole else "real numbers" }}) '
        'that bring the best total.',
      ),
    ),
  ),
  'covering': (
    Pieces(
      (
        'A {{ actor }} buys packages from {{ items | names | words }}.',
        'Packages for a {{ actor }} come from {{ items | names | words }}.',
        'A {{ actor }} orders at {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}'
        'A package from {{ i.name }} costs {{ i.cost }} and holds '
        '{% for r, n in i.holds.items() %}'
        '{{ n }} {{ r }}{{ ", " if not loop.last }}{% endfor %}'
        '{% if i.upper %}; it has at most {{ i.upper }} of them{% endif %}'
        '. {% endfor %}'
        '{% for r in contents %}At least {{ r.need }} {{ r.name }} is needed. '
        '{% endfor %}',
        'Needs: {% for r in contents %}{{ r.need }} {{ r.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        '{% for i in items %}'
        'The package of {{ i.name }} contains '
        '{% for r, n in i.holds.items() %}{{ n }} {{ r }}, {% endfor %}'
        'and its price is {{ i.cost }}'
        '{% if i.upper %}; the largest order is {{ i.upper }}{% endif %}'
        '. {% endfor %}',
        '| package | cost |'
        '{% for r in contents %} {{ r.name }} |{% endfor %} max |\n'
        '{% for i in items %}| {{ i.name }} | {{ i.cost }} |'
        '{% for r in contents %} {{ i.holds.get(r.name, "-") }} |{% endfor %}'
        ' {{ i.upper or "-" }} |\n'
        '{% endfor %}| need | |'
        '{% for r in contents %} {{ r.need }} |{% endfor %} |',
        'Prices are {% for i in items %}{{ i.cost }} at {{ i.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        '{% for r in contents %}'
        'The {{ r.need }} {{ r.name }} that must be had'
        '{% for i in items if r.name in i.holds %}'
        '{{ ": " if loop.first else ", " }}'
        '{{ i.name }} packs {{ i.holds[r.name] }}{% endfor %}. '
        '{% endfor %}'
        '{% for i in items if i.upper %}'
        'No more than {{ i.upper }} can come from {{ i.name }}. {% endfor %}',
        '{% for i in items %}'
        '{{ i.name }}: cost {{ i.cost }}'
        '{% for r, n in i.holds.items() %}, {{ r }} {{ n }}{% endfor %}'
        '{% if i.upper %}, maximum {{ i.upper }}{% endif %}. '
        '{% endfor %}'
        'Minimums: {% for r in contents %}{{ r.name }} {{ r.need }}'
        '{{ ", " if not loop.last }}{% endfor %}.',
      ),
      (
        'Minimize the cost; {{ "only whole packages count" if whole else '
        '"parts of packages count" }}.',
        'Find the lowest cost, with '
        '{{ "whole numbers of packages" if whole else "fractions allowed" }}.',
        '{{ "In whole packages" if whole else "With any fractions" }}, what '
        'is the cheapest order?',
      ),
    ),
    Pieces(
      (
        'We run a {{ actor }} that is supplied by {{ items | names | words }}.',
        'Our {{ actor }} can shop at {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}'
        'Each kit sold by {{ i.name }} has a price of {{ i.cost }} and gives '
        '{% for r, n in i.holds.items() %}'
        '{{ n }} of {{ r }}{{ ", " if not loop.last }}{% endfor %}'
        '{% if i.upper %}, and {{ i.upper }} are there{% endif %}'
        '. {% endfor %}'
        'We want no less than '
        '{% for r in contents %}{{ r.need }} of {{ r.name }}'
        '{{ ", " if not loop.last }}{% endfor %}.',
        'seller;price;{{ contents | names | join(";") }};to\n'
        '{% for i in items %}{{ i.name }};{{ i.cost }}'
        '{% for r in contents %};{{ i.holds.get(r.name, "") }}{% endfor %}'
        ';{{ i.upper or "" }}\n'
        '{% endfor %}required;'
        '{% for r in contents %};{{ r.need }}{% endfor %};',
      ),
      (
        'How little can be spent'
        '{{ ", in complete kits" if whole else ", kits being divisible" }}?',
        'Choose the amounts ({{ "integers" if whole else "real numbers" }}) '
        'that spend the least.',
      ),
    ),
  ),
  'knapsack': (
    Pieces(
      (
        'A {{ actor }} packs a load from {{ items | names | words }}.',
        'A load for a {{ actor }} is chosen from {{ items | names | words }}.',
        'A {{ actor }} selects among {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}'
        'The {{ i.name }} is worth {{ i.value }} and weighs {{ i.weight }}. '
        '{% endfor %}The load may weigh {{ capacity }}.',
        'The weight limit is {{ capacity }}. {% for i in items %}'
        'With a weight of {{ i.weight }} the {{ i.name }} adds '
        '{{ i.value }}. {% endfor %}',
        '| item | value | weight |\n'
        '{% for i in items %}'
        '| {{ i.name }} | {{ i.value }} | {{ i.weight }} |\n'
        '{% endfor %}| limit | | {{ capacity }} |',
        'Values are {% for i in items %}{{ i.value }} for {{ i.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        'Weights are {% for i in items %}{{ i.weight }} for {{ i.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        'No more than {{ capacity }} can be carried.',
        '{% for i in items %}'
        '{{ i.name }}: value {{ i.value }}, weight {{ i.weight }}. '
        '{% endfor %}Limit: {{ capacity }}.',
      ),
      (
        'Maximize the value; each is taken once or left.',
        'Find the largest value, taking each or not.',
        'What is the highest value if each is there once?',
      ),
    ),
    Pieces(
      (
        'We fill one van of a {{ actor }}: {{ items | names | words }}.',
        'Our {{ actor }} has room for some of {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}'
        'One {{ i.name }} brings in {{ i.value }} at {{ i.weight }} kilos. '
        '{% endfor %}We can take {{ capacity }} kilos.',
        'item;gain;kilos\n'
        '{% for i in items %}'
        '{{ i.name }};{{ i.value }};{{ i.weight }}\n'
        '{% endfor %}available;;{{ capacity }}',
      ),
      (
        'How much can be gained at best, with single pieces?',
        'Choose pieces, one of a kind, that bring the best total.',
      ),
    ),
  ),
  'transport': (
    Pieces(
      (
        'A {{ actor }} ships from {{ sites | names | words }} to '
        '{{ clients | names | words }}.',
        'Goods of a {{ actor }} move from {{ sites | names | words }} to '
        '{{ clients | names | words }}.',
        '{{ clients | names | words }} are served by a {{ actor }} from '
        '{{ sites | names | words }}.',
      ),
      (
        '{% for s in sites %}The supply at {{ s.name }} is {{ s.supply }}. '
        '{% endfor %}'
        '{% for c in clients %}The demand of {{ c.name }} is {{ c.demand }}. '
        '{% endfor %}'
        '{% for s in sites %}A unit from {{ s.name }} costs '
        '{% for c, n in s.costs.items() %}{{ n }} to {{ c }}'
        '{{ ", " if not loop.last }}{% endfor %}. {% endfor %}',
        '| from | {{ clients | names | join(" | ") }} | supply |\n'
        '{% for s in sites %}| {{ s.name }} |'
        '{% for c in clients %} {{ s.costs[c.name] }} |{% endfor %}'
        ' {{ s.supply }} |\n{% endfor %}'
        '| demand |{% for c in clients %} {{ c.demand }} |{% endfor %} |',
        '{% for s in sites %}{{ s.name }} has {{ s.supply }} units'
        '{% for c, n in s.costs.items() %}, at {{ n }} a unit to {{ c }}'
        '{% endfor %}. {% endfor %}'
        'Required are {% for c in clients %}{{ c.demand }} in {{ c.name }}'
        '{{ ", " if not loop.last }}{% endfor %}.',
      ),
      (
        'Minimize the total cost of transport; any amounts can be split.',
        'What is the lowest shipping cost? Units can be divided.',
        'Meet all demands at the least cost; fractions can be shipped.',
      ),
    ),
    Pieces(
      (
        'Our {{ actor }} stores goods in {{ sites | names | words }} for '
        '{{ clients | names | words }}.',
      ),
      (
        '{% for s in sites %}In {{ s.name }} lie {{ s.supply }}, and freight '
        'is {% for c, n in s.costs.items() %}{{ n }} for {{ c }}'
        '{{ ", " if not loop.last }}{% endfor %}. {% endfor %}'
        '{% for c in clients %}{{ c.name }} waits for {{ c.demand }}. '
        '{% endfor %}',
        'store;{{ clients | names | join(";") }};stock\n'
        '{% for s in sites %}{{ s.name }}'
        '{% for c in clients %};{{ s.costs[c.name] }}{% endfor %}'
        ';{{ s.supply }}\n{% endfor %}'
        'wanted{% for c in clients %};{{ c.demand }}{% endfor %};',
      ),
      (
        'How little can the freight cost if loads are divisible?',
        'Choose the amounts, real numbers, that spend the least on freight.',
      ),
    ),
  ),
  'max_flow': (
    Pieces(
      (
        'A {{ actor }} sends goods from {{ source }} to {{ sink }}.',
        'The network of a {{ actor }} begins at {{ source }} and ends at '
        '{{ sink }}.',
        'Goods of a {{ actor }} start at {{ source }} and go to {{ sink }}.',
      ),
      (
        '{% for a in arcs %}The link from {{ a.tail }} to {{ a.head }} '
        'carries {{ a.capacity }}. {% endfor %}',
        '| from | to | capacity |\n{% for a in arcs %}'
        '| {{ a.tail }} | {{ a.head }} | {{ a.capacity }} |\n{% endfor %}',
        'Capacities: {% for a in arcs %}{{ a.tail }} to {{ a.head }} '
        '{{ a.capacity }}{{ ", " if not loop.last }}{% endfor %}.',
      ),
      (
        'Maximize the flow; what enters a place in between leaves it.',
        'What is the largest flow? Nothing stays on the way.',
        'Find the greatest amount that can be sent at once.',
      ),
    ),
    Pieces(
      ('Our {{ actor }} pumps from {{ source }}, and {{ sink }} receives.',),
      (
        '{% for a in arcs %}Up to {{ a.capacity }} fit through the pipe '
        'between {{ a.tail }} and, downstream, {{ a.head }}. {% endfor %}',
        'start;end;room\n{% for a in arcs %}'
        '{{ a.tail }};{{ a.head }};{{ a.capacity }}\n{% endfor %}',
      ),
      (
        'How much can arrive at best?',
        'Choose the streams that deliver most, without stores on the way.',
      ),
    ),
  ),
  'assignment': (
    Pieces(
      (
        '{{ workers | names | words }} of a {{ actor }} do {{ jobs | words }}.',
        'A {{ actor }} gives {{ jobs | words }} to '
        '{{ workers | names | words }}.',
        'In a {{ actor }}, {{ jobs | words }} are left to do by '
        '{{ workers | names | words }}.',
      ),
      (
        '{% for w in workers %}{{ w.name }} has {% for j in jobs %}'
        '{{ w.costs[j] }} for {{ j }}{{ ", " if not loop.last }}{% endfor %}. '
        '{% endfor %}',
        '| | {{ jobs | join(" | ") }} |\n{% for w in workers %}'
        '| {{ w.name }} |{% for j in jobs %} {{ w.costs[j] }} |{% endfor %}\n'
        '{% endfor %}',
        '{% for j in jobs %}For {{ j }} the figures are '
        '{% for w in workers %}{{ w.costs[j] }} with {{ w.name }}'
        '{{ ", " if not loop.last }}{% endfor %}. {% endfor %}',
      ),
      (
        'Each does one job, and the figures are '
        '{{ "scores: maximize their sum" if maximize else '
        '"costs: minimize their sum" }}.',
        'Pair them one to one, for the '
        '{{ "largest total score" if maximize else "lowest total cost" }}.',
        'With one job each, what is the '
        '{{ "highest sum of these points" if maximize else '
        '"smallest sum of these prices" }}?',
      ),
    ),
    Pieces(
      (
        'Our {{ actor }} has {{ workers | names | words }} on duty, and '
        '{{ jobs | words }} are open.',
      ),
      (
        '{% for w in workers %}With {{ w.name }} the numbers read '
        '{% for j in jobs %}{{ w.costs[j] }} in {{ j }}'
        '{{ ", " if not loop.last }}{% endfor %}. {% endfor %}',
        'who;{{ jobs | join(";") }}\n{% for w in workers %}{{ w.name }}'
        '{% for j in jobs %};{{ w.costs[j] }}{% endfor %}\n{% endfor %}',
      ),
      (
        'Nobody does two, and nothing stays undone: how '
        '{{ "much can be gained" if maximize else "little can be spent" }} '
        'at best?',
      ),
    ),
  ),
  'scheduling': (
    Pieces(
      (
        'A {{ actor }} has {{ workers | words }} for '
        '{{ jobs | names | words }}.',
        '{{ workers | words }} of a {{ actor }} share '
        '{{ jobs | names | words }}.',
        'The jobs of a {{ actor }} are {{ jobs | names | words }}, for '
        '{{ workers | words }}.',
      ),
      (
        '{% for j in jobs %}The job {{ j.name }} takes {{ j.hours }} hours. '
        '{% endfor %}',
        '| job | hours |\n{% for j in jobs %}'
        '| {{ j.name }} | {{ j.hours }} |\n{% endfor %}',
        'Hours: {% for j in jobs %}{{ j.name }} {{ j.hours }}'
        '{{ ", " if not loop.last }}{% endfor %}.',
      ),
      (
        'Each job is done by one, without a break: minimize the hour at which '
        'all are finished.',
        'What is the shortest time until the last job is done? No job is '
        'shared.',
        'Find the least makespan, with every job on one of them.',
      ),
    ),
    Pieces(
      (
        'Our {{ actor }} must see {{ jobs | names | words }} done by '
        '{{ workers | words }}.',
      ),
      (
        '{% for j in jobs %}We count {{ j.hours }} hours for {{ j.name }}. '
        '{% endfor %}',
        'task;length\n{% for j in jobs %}{{ j.name }};{{ j.hours }}\n'
        '{% endfor %}',
      ),
      (
        'How early can everybody go home if no task is split?',
        'Divide the tasks so that the longer list ends as soon as possible.',
      ),
    ),
  ),
  'shifts': (
    Pieces(
      (
        'A {{ actor }} plans its staff.',
        'The staff of a {{ actor }} works in shifts.',
        'Shifts of a {{ actor }} have to be filled.',
      ),
      (
        '{% for p in periods %}At least {{ p.need }} people work in the '
        '{{ p.name }}. {% endfor %}'
        '{% for s in shifts %}A person who is there in the {{ s.first }} and '
        'the {{ s.second }} earns {{ s.wage }}. {% endfor %}',
        '| period | people |\n{% for p in periods %}'
        '| {{ p.name }} | {{ p.need }} |\n{% endfor %}'
        '| shift | | wage |\n{% for s in shifts %}'
        '| {{ s.first }} | {{ s.second }} | {{ s.wage }} |\n{% endfor %}',
        'People needed: {% for p in periods %}{{ p.name }} {{ p.need }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        'Wages by shift: {% for s in shifts %}{{ s.first }} and '
        '{{ s.second }} {{ s.wage }}{{ ", " if not loop.last }}{% endfor %}.',
      ),
      (
        'Minimize the wages.',
        'What is the lowest sum of wages?',
        'Cover every period at the least cost.',
      ),
    ),
    Pieces(
      ('Our {{ actor }} hires by shift.',),
      (
        '{% for s in shifts %}We pay {{ s.wage }} to each who stays from '
        '{{ s.first }} through {{ s.second }}. {% endfor %}'
        '{% for p in periods %}No fewer than {{ p.need }} must be present at '
        '{{ p.name }}. {% endfor %}',
        'time;crew\n{% for p in periods %}{{ p.name }};{{ p.need }}\n'
        '{% endfor %}begins;ends;pay\n{% for s in shifts %}'
        '{{ s.first }};{{ s.second }};{{ s.wage }}\n{% endfor %}',
      ),
      ('How little can be spent on the crew?',),
    ),
  ),
  'bin_packing': (
    Pieces(
      (
        'A {{ actor }} puts {{ items | names | words }} into equal boxes.',
        'Equal boxes of a {{ actor }} take {{ items | names | words }}.',
        'A {{ actor }} has to box {{ items | names | words }}.',
      ),
      (
        '{% for i in items %}The {{ i.name }} weighs {{ i.weight }}. '
        '{% endfor %}A box holds {{ capacity }}.',
        '| item | weight |\n{% for i in items %}'
        '| {{ i.name }} | {{ i.weight }} |\n{% endfor %}'
        '| box | {{ capacity }} |',
        'Weights: {% for i in items %}{{ i.name }} {{ i.weight }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        'A box is full at {{ capacity }}.',
      ),
      (
        'Minimize the number of boxes.',
        'What is the least number of boxes?',
        'Use as few boxes as possible.',
      ),
    ),
    Pieces(
      ('Our {{ actor }} moves {{ items | names | words }} by van.',),
      (
        '{% for i in items %}We weighed {{ i.weight }} kilos of '
        '{{ i.name }}. {% endfor %}Each van is closed at {{ capacity }} kilos.',
        'goods;kilos\n{% for i in items %}{{ i.name }};{{ i.weight }}\n'
        '{% endfor %}van;{{ capacity }}',
      ),
      (
        'How few vans are enough if no goods are split?',
        'Choose vans, all of one size, so that most stay at home.',
      ),
    ),
  ),
  'set_cover': (
    Pieces(
      (
        'A {{ actor }} may open {{ sites | names | words }} to reach '
        '{{ clients | words }}.',
        'To reach {{ clients | words }}, a {{ actor }} rents among '
        '{{ sites | names | words }}.',
        'A {{ actor }} chooses from {{ sites | names | words }}; '
        '{{ clients | words }} must be reached.',
      ),
      (
        '{% for s in sites %}The {{ s.name }} costs {{ s.cost }} and reaches '
        '{{ s.reach | words }}. {% endfor %}',
        '| site | cost | reaches |\n{% for s in sites %}'
        '| {{ s.name }} | {{ s.cost }} | {{ s.reach | join(", ") }} |\n'
        '{% endfor %}',
        'Costs: {% for s in sites %}{{ s.name }} {{ s.cost }}'
        '{{ ", " if not loop.last }}{% endfor %}. '
        '{% for s in sites %}From {{ s.name }} it is possible to reach '
        '{{ s.reach | words }}. {% endfor %}',
      ),
      (
        'Minimize the cost of reaching every one of them.',
        'What is the lowest cost at which none is left out?',
        'Find the cheapest choice that reaches all.',
      ),
    ),
    Pieces(
      (
        'Our {{ actor }} looks after {{ clients | words }} from '
        '{{ sites | names | words }}.',
      ),
      (
        '{% for s in sites %}If we rent the {{ s.name }} for {{ s.cost }}, we '
        'look after {{ s.reach | words }}. {% endfor %}',
        'base;rent;near\n{% for s in sites %}'
        '{{ s.name }};{{ s.cost }};{{ s.reach | join(", ") }}\n{% endfor %}',
      ),
      (
        'How little rent is enough if everybody has a base nearby?',
        'Choose the bases that spend the least on rent, with all looked after.',
      ),
    ),
  ),
}
