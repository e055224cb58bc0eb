# SPDX-License-Identifier: Apache-2.0
"""Tools from functions: their schemas, and what becomes of arguments."""

import dataclasses
import enum
import json
from typing import Any, Literal

import pydantic
import pytest

pytest.importorskip('openai')

from moepeft.agent.tools import InvalidArguments, make_tool, strict_schema  # noqa: E402


class Unit(enum.Enum):
  CELSIUS = 'c'
  KELVIN = 'k'


class Place(pydantic.BaseModel):
  """A place."""

  city: str
  floor: int = 3
  tags: list[str] = []


def weather(
  place: Place,
  days: int,
  unit: Unit = Unit.KELVIN,
  kind: Literal['rain', 'sun'] = 'sun',
  note: str | None = None,
) -> str:
  """Tells the weather.

  Of tomorrow and later.

  Args:
    place: where it is,
      roughly.
    days: from today on.

  Returns:
    a text.
  """
  return f'{place.city} {place.floor} {days} {unit.name} {kind} {note}'


def objects(node):
  if isinstance(node, dict):
    if node.get('type') == 'object':
      yield node
    for value in node.values():
      yield from objects(value)
  if isinstance(node, list):
    for value in node:
      yield from objects(value)


def test_a_schema_requires_all_and_allows_nothing_else():
  schema = make_tool(weather).schema
  nodes = list(objects(schema))
  # The arguments and the place, which the description writes out, and the
  # definition of it that stays.
  assert len(nodes) == 3
  for node in nodes:
    assert node['additionalProperties'] is False
    assert node['required'] == list(node['properties'])
  assert list(schema['properties']) == ['place', 'days', 'unit', 'kind', 'note']
  text = json.dumps(schema)
  assert '"default"' not in text


def test_what_has_a_default_says_it_as_a_strict_schema_has_none():
  tool_ = make_tool(weather).schema['properties']
  assert tool_['days']['description'] == 'from today on.'
  assert tool_['kind']['description'] == 'By default "sun".'
  assert tool_['note']['anyOf'] == [{'type': 'string'}, {'type': 'null'}]
  # A server that does not hold to the schema may leave it out.
  text = '{"place": {"city": "Ulm"}, "days": 2}'
  assert make_tool(weather).run(text) == 'Ulm 3 2 KELVIN sun None'


def test_docstrings_describe_the_tool_and_its_arguments():
  tool_made = make_tool(weather)
  assert tool_made.description == 'Tells the weather.\n\nOf tomorrow and later.'
  place = tool_made.schema['properties']['place']
  assert place['description'] == 'where it is, roughly.'


@pytest.mark.parametrize(
  ('arguments', 'description'),
  [
    ('{"place": ', 'Invalid JSON'),
    ('[1]', 'an object'),
    ('{"days": 1}', 'place: Field required'),
    ('{"place": {"city": "U"}, "days": "x"}', 'days: Input should be'),
    ('{"place": {"city": "U"}, "days": 1, "more": 1}', 'more: Extra inputs'),
  ],
)
def test_arguments_that_do_not_fit_are_told_by_name(arguments, description):
  with pytest.raises(InvalidArguments, match=description):
    make_tool(weather).run(arguments)


def test_a_dataclass_is_taken_and_given_back_as_json():
  @dataclasses.dataclass
  class Point:
    x: float
    y: float = 2.0

  def mirrored(point: Point) -> Point:
    """Mirrors."""
    return Point(-point.x, -point.y)

  answer = make_tool(mirrored).run('{"point": {"x": 1}}')
  assert json.loads(answer) == {'x': -1.0, 'y': -2.0}


def untyped(a) -> str:
  """No."""


def any_value(a: Any) -> str:
  """No."""


def free(a: dict) -> str:
  """No."""


def mapped(a: dict[str, int]) -> str:
  """No."""


def untyped_list(a: list) -> str:
  """No."""


def spread(*a: int) -> str:
  """No."""


def misspelt(a: int) -> str:
  """No.

  Args:
    b: what is not there.
  """


@pytest.mark.parametrize(
  ('function', 'description'),
  [
    (untyped, 'has no type; annotate it'),
    (any_value, 'without one type'),
    (free, 'without one type'),
    (mapped, 'without one type'),
    (untyped_list, 'without one type'),
    (spread, 'give each argument a name'),
    (misspelt, "describes 'b'"),
  ],
)
def test_a_function_without_a_strict_schema_is_refused(function, description):
  with pytest.raises(ValueError, match=description):
    make_tool(function)


def test_a_model_that_holds_itself_keeps_its_references():
  class Tree(pydantic.BaseModel):
    name: str
    below: list['Tree'] = []

  (definition,) = strict_schema(Tree, 'Tree')['$defs'].values()
  assert definition['additionalProperties'] is False
  assert definition['required'] == ['name', 'below']


def test_a_tool_without_arguments_has_an_empty_strict_schema():
  def now() -> str:
    """Now."""
    return 'noon'

  tool_made = make_tool(now)
  assert (
    tool_made.schema['properties'] == {} and tool_made.schema['required'] == []
  )
  assert tool_made.run('') == tool_made.run('{}') == 'noon'
