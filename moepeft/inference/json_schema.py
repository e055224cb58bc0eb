# SPDX-License-Identifier: Apache-2.0
"""JSON schemas (draft 2020-12) as llguidance's compiler is to read them.

It keeps most of what schemas say and refuses the rest. What is done here is
what it does not see to: white space without end, days that no year has, keys
that come twice, and schemas whose compilation would take minutes.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

# One blank after a comma and a colon at most. The default of llguidance is any
# white space at any place, which a model may write without end.
SPACING = {
  'whitespace_flexible': False,
  'item_separator': ', ?',
  'key_separator': ': ?',
}
# Of a schema's JSON, its nesting, and the schemas inside of it: compiling a
# thousand takes about a second.
CHARACTERS, DEPTH, PARTS = 100_000, 64, 1_000
# Numbers that are multiples of n need about n states, and n^2 time.
MULTIPLE = 5_000

# Where schemas stand in a schema: under names, in lists, alone.
_NAMED = ('properties', 'patternProperties', '$defs', 'definitions')
_LISTED = ('allOf', 'anyOf', 'oneOf', 'prefixItems')
_ALONE = ('additionalProperties', 'items')
_IN_PLACE = ('allOf', 'anyOf', 'oneOf', '$ref')
_NOTES = {
  *('title', 'description', 'default', 'examples', 'deprecated', 'readOnly'),
  *('writeOnly', '$comment', '$schema', '$id', '$defs', 'definitions'),
  *('discriminator', 'nullable'),
}
_DAY = (
  r'(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])'
  r'|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))'
  # The 29th of February: years by 4, and of the hundreds those by 400.
  r'|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])'
  r'|(?:[02468][048]|[13579][26])00)-02-29)'
)
_TIME = (
  r'(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?'
  r'(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])'
)
# RFC 3339, without leap seconds, which few readers take.
_FORMATS = {
  'date': f'^{_DAY}$',
  'time': f'^{_TIME}$',
  'date-time': f'^{_DAY}T{_TIME}$',
}


def prepared(schema: Any, strict: bool) -> str:
  """A schema as the JSON text that is compiled.

  Objects that list properties have no others, unless the schema speaks of
  `additionalProperties`, or joins objects by allOf and the like: answers are
  then of fewer kinds, and each fits the schema.

  Args:
    strict: whether what llguidance cannot keep is an error; else it is left
      out, and answers may break it.

  Raises:
    ValueError: it is no schema, too large, nested too deeply, or asks for what
      cannot be kept or would take too long.
  """
  if not isinstance(schema, dict):
    raise ValueError(
      f'a JSON schema is an object, got {type(schema).__name__}; write '
      '{"type": ...}'
    )
  check_depth(schema)
  size = len(written(schema))
  if size > CHARACTERS:
    raise ValueError(
      f'the JSON schema has {size:,} characters, expected at most '
      f'{CHARACTERS:,}; make it smaller'
    )
  if 'x-guidance' in schema:
    raise ValueError(
      "the JSON schema has 'x-guidance', by which the compiler's own options "
      'would be changed; leave it out'
    )
  copied = copy.deepcopy(schema)
  every = list(_schemas(copied))
  if len(every) > PARTS:
    raise ValueError(
      f'the JSON schema has {len(every):,} schemas inside of it, expected at '
      f'most {PARTS:,}; make it smaller'
    )
  _check_multiples(every)
  close = _apart(every)
  for part in every:
    _mend(part, close)
  options = SPACING if strict else SPACING | {'lenient': True}
  return written({'x-guidance': options, **copied})


def written(value: Any) -> str:
  """A value as JSON.

  Raises:
    ValueError: it is not JSON.
  """
  try:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
  except (TypeError, ValueError, RecursionError) as e:
    raise ValueError(f'the JSON schema is not JSON ({e}); mend it') from None


def check_depth(value: Any) -> None:
  """
  Raises:
    ValueError: lists and objects are nested too deeply.
  """
  level = [value]
  for _ in range(DEPTH + 1):
    level = [child for item in level for child in _children(item)]
    if not level:
      return
  raise ValueError(
    f'the JSON schema is nested deeper than {DEPTH} levels; make it flatter, '
    "or refer to parts of it with '$ref'"
  )


def _children(value: Any) -> Iterator[Any]:
  if isinstance(value, dict):
    yield from value.values()
  elif isinstance(value, list | tuple):
    yield from value


@dataclasses.dataclass(eq=False)
class _Part:
  """A schema inside of one; `joined` to others that the same value keeps."""

  schema: dict
  joined: bool


def _schemas(schema: Any, joined: bool = False) -> Iterator[_Part]:
  """It and every schema inside of it."""
  if not isinstance(schema, dict):
    return
  yield _Part(schema, joined)
  for key in _NAMED:
    named = schema.get(key)
    for child in named.values() if isinstance(named, dict) else ():
      yield from _schemas(child)
  for key in _LISTED:
    listed = schema.get(key)
    # Beside nothing else, options stand alone.
    beside = set(schema) - _NOTES - {key}
    within = key in _IN_PLACE and (joined or bool(beside) or key == 'allOf')
    for child in listed if isinstance(listed, list) else ():
      yield from _schemas(child, within)
  for key in _ALONE:
    yield from _schemas(schema.get(key))


def _apart(every: list[_Part]) -> bool:
  """Whether no schema is referred to from where others hold too."""
  for part in every:
    schema = part.schema
    if (
      'allOf' in schema
      or '$ref' in schema
      and (part.joined or set(schema) - _NOTES - {'$ref'})
    ):
      return False
  return True


def _mend(part: _Part, close: bool) -> None:
  """Says in other words what llguidance leaves out, or raises."""
  schema = part.schema
  if schema.get('uniqueItems') is False:
    del schema['uniqueItems']
  _check_keys(schema)
  pattern = _FORMATS.get(_text(schema.get('format')))
  if pattern:
    del schema['format']
    if 'pattern' in schema:
      joined = schema.get('allOf', [])
      if not isinstance(joined, list):
        raise ValueError(
          f"'allOf' of a JSON schema is a list, got {type(joined).__name__}"
        )
      schema['allOf'] = [*joined, {'pattern': pattern}]
    else:
      schema['pattern'] = pattern
  if close and not part.joined and _closable(schema):
    schema['additionalProperties'] = False


def _text(value: Any) -> str:
  return value if isinstance(value, str) else ''


def _closable(schema: dict) -> bool:
  properties = schema.get('properties')
  spoken = (*_IN_PLACE, 'additionalProperties', 'patternProperties')
  if not isinstance(properties, dict) or any(key in schema for key in spoken):
    return False
  required = schema.get('required', [])
  within = isinstance(required, list) and all(
    k in [*properties] for k in required
  )
  return within and 'minProperties' not in schema


def _check_keys(schema: dict) -> None:
  """Keys that the schema does not name may come twice, and then count once."""
  required = schema.get('required', ())
  least = schema.get('minProperties', 0)
  sized = isinstance(required, list | tuple) and isinstance(least, int)
  if sized and least > len(required) + 1:
    raise ValueError(
      f"the JSON schema has 'minProperties' {least} beside {len(required)} "
      'required properties, of which one more can be kept; name them in '
      "'properties' and 'required'"
    )


def _check_multiples(every: list[_Part]) -> None:
  multiples = [1]
  for part in every:
    value = part.schema.get('multipleOf')
    if isinstance(value, int | float) and not isinstance(value, bool):
      multiples.append(_coefficient(value))
  if math.lcm(*multiples) > MULTIPLE:
    raise ValueError(
      f"the least number that every 'multipleOf' of the JSON schema divides is "
      f'above {MULTIPLE:,}, which takes too long to compile; use smaller ones'
    )


def _coefficient(value: float) -> int:
  """The digits of a number without the zeros at its ends: 7 of 0.070."""
  try:
    digits = Decimal(repr(value)).normalize().as_tuple().digits
  except InvalidOperation:
    return 1
  return max(1, int(''.join(map(str, digits))))
