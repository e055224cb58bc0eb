# SPDX-License-Identifier: Apache-2.0
"""Prepares JSON schemas (draft 2020-12) for llguidance's compiler.

The compiler enforces most keywords and refuses the others. This module adds
what the compiler lacks: bounded white space, valid dates, a check for keys that
may occur twice, and limits on schemas that would take minutes to compile.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

# At most one space after a comma and a colon. By default, llguidance allows any
# white space everywhere, which a model may generate without end.
SPACING = {
  'whitespace_flexible': False,
  'item_separator': ', ?',
  'key_separator': ': ?',
}
# Limits on a schema's JSON text, nesting and subschemas. A thousand subschemas
# take about a second to compile.
MAX_CHARACTERS, MAX_DEPTH, MAX_SUBSCHEMAS = 100_000, 64, 1_000
# A grammar for multiples of n has about n states and takes n^2 time to compile.
MAX_MULTIPLE = 5_000

# Keywords whose values are mappings of schemas, lists of schemas, and schemas.
_SCHEMA_MAPS = ('properties', 'patternProperties', '$defs', 'definitions')
_SCHEMA_LISTS = ('allOf', 'anyOf', 'oneOf', 'prefixItems')
_SCHEMA_KEYS = ('additionalProperties', 'items')
_IN_PLACE = ('allOf', 'anyOf', 'oneOf', '$ref')
_ANNOTATIONS = {
  *('title', 'description', 'default', 'examples', 'deprecated', 'readOnly'),
  *('writeOnly', '$comment', '$schema', '$id', '$defs', 'definitions'),
  *('discriminator', 'nullable'),
}
_DAY = (
  r'(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])'
  r'|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))'
  # 29 February: years divisible by 4, and centuries divisible by 400.
  r'|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])'
  r'|(?:[02468][048]|[13579][26])00)-02-29)'
)
_TIME = (
  r'(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?'
  r'(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])'
)
# RFC 3339, without leap seconds, which few parsers accept.
_FORMATS = {
  'date': f'^{_DAY}$',
  'time': f'^{_TIME}$',
  'date-time': f'^{_DAY}T{_TIME}$',
}


def prepare(schema: Any, strict: bool) -> str:
  """Prepares a schema, and returns the JSON text to compile.

  Objects with `properties` get `additionalProperties: false`, unless the schema
  sets it or combines objects by allOf and similar keywords. Fewer answers are
  possible then, and all of them fit the schema.

  Args:
    strict: whether keywords that llguidance does not support are errors;
      otherwise they are ignored, and answers may violate them.

  Raises:
    ValueError: the schema is invalid, too large, nested too deeply, or cannot
      be compiled.
  """
  if not isinstance(schema, dict):
    raise ValueError(
      f'a JSON schema is an object, got {type(schema).__name__}; write '
      '{"type": ...}'
    )
  check_depth(schema)
  size = len(to_json(schema))
  if size > MAX_CHARACTERS:
    raise ValueError(
      f'the JSON schema has {size:,} characters, expected at most '
      f'{MAX_CHARACTERS:,}; make it smaller'
    )
  if 'x-guidance' in schema:
    raise ValueError(
      "the JSON schema has 'x-guidance', which would change the compiler's "
      'options; leave it out'
    )
  schema_copy = copy.deepcopy(schema)
  subschemas = list(_subschemas(schema_copy))
  if len(subschemas) > MAX_SUBSCHEMAS:
    raise ValueError(
      f'the JSON schema has {len(subschemas):,} subschemas, expected at most '
      f'{MAX_SUBSCHEMAS:,}; make it smaller'
    )
  _check_multiples(subschemas)
  close = _can_close(subschemas)
  for subschema in subschemas:
    _translate(subschema, close)
  options = SPACING if strict else SPACING | {'lenient': True}
  return to_json({'x-guidance': options, **schema_copy})


def to_json(value: Any) -> str:
  """Converts a value to JSON text.

  Raises:
    ValueError: the value is not JSON.
  """
  try:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
  except (TypeError, ValueError, RecursionError) as e:
    raise ValueError(f'the JSON schema is not JSON ({e}); correct it') from None


def check_depth(value: Any) -> None:
  """Checks the nesting of lists and objects.

  Raises:
    ValueError: they are nested too deeply.
  """
  level = [value]
  for _ in range(MAX_DEPTH + 1):
    level = [child for item in level for child in _children(item)]
    if not level:
      return
  raise ValueError(
    f'the JSON schema is nested deeper than {MAX_DEPTH} levels; make it '
    "flatter, or refer to parts of it with '$ref'"
  )


def _children(value: Any) -> Iterator[Any]:
  if isinstance(value, dict):
    yield from value.values()
  elif isinstance(value, list | tuple):
    yield from value


@dataclasses.dataclass(eq=False)
class _Subschema:
  """A subschema.

  Attributes:
    joined: whether the same value must fit other subschemas too.
  """

  schema: dict
  joined: bool


def _subschemas(schema: Any, joined: bool = False) -> Iterator[_Subschema]:
  """Yields a schema and all its subschemas."""
  if not isinstance(schema, dict):
    return
  yield _Subschema(schema, joined)
  for key in _SCHEMA_MAPS:
    mapping = schema.get(key)
    for child in mapping.values() if isinstance(mapping, dict) else ():
      yield from _subschemas(child)
  for key in _SCHEMA_LISTS:
    schemas = schema.get(key)
    # Without other keywords, the options are the whole schema.
    other_keys = set(schema) - _ANNOTATIONS - {key}
    is_joined = key in _IN_PLACE and (
      joined or bool(other_keys) or key == 'allOf'
    )
    for child in schemas if isinstance(schemas, list) else ():
      yield from _subschemas(child, is_joined)
  for key in _SCHEMA_KEYS:
    yield from _subschemas(schema.get(key))


def _can_close(subschemas: list[_Subschema]) -> bool:
  """Whether no schema is combined with a referenced one."""
  for subschema in subschemas:
    schema = subschema.schema
    if (
      'allOf' in schema
      or '$ref' in schema
      and (subschema.joined or set(schema) - _ANNOTATIONS - {'$ref'})
    ):
      return False
  return True


def _translate(subschema: _Subschema, close: bool) -> None:
  """Rewrites keywords that llguidance ignores, or raises ValueError."""
  schema = subschema.schema
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
  if close and not subschema.joined and _may_close(schema):
    schema['additionalProperties'] = False


def _text(value: Any) -> str:
  return value if isinstance(value, str) else ''


def _may_close(schema: dict) -> bool:
  properties = schema.get('properties')
  open_keys = (*_IN_PLACE, 'additionalProperties', 'patternProperties')
  if not isinstance(properties, dict) or any(
    key in schema for key in open_keys
  ):
    return False
  required = schema.get('required', [])
  is_joined = isinstance(required, list) and all(
    k in [*properties] for k in required
  )
  return is_joined and 'minProperties' not in schema


def _check_keys(schema: dict) -> None:
  """Checks minProperties: keys that are not named may be generated twice."""
  required = schema.get('required', ())
  min_properties = schema.get('minProperties', 0)
  is_valid = isinstance(required, list | tuple) and isinstance(
    min_properties, int
  )
  if is_valid and min_properties > len(required) + 1:
    raise ValueError(
      f"the JSON schema has 'minProperties' {min_properties} and "
      f'{len(required)} required properties; expected at most one more than '
      "these: name them in 'properties' and 'required'"
    )


def _check_multiples(subschemas: list[_Subschema]) -> None:
  multiples = [1]
  for subschema in subschemas:
    value = subschema.schema.get('multipleOf')
    if isinstance(value, int | float) and not isinstance(value, bool):
      multiples.append(_coefficient(value))
  if math.lcm(*multiples) > MAX_MULTIPLE:
    raise ValueError(
      "the least common multiple of the JSON schema's 'multipleOf' values is "
      f'above {MAX_MULTIPLE:,}, which takes too long to compile; use smaller '
      'ones'
    )


def _coefficient(value: float) -> int:
  """The digits of a number without zeros at the ends: 7 for 0.070."""
  try:
    digits = Decimal(repr(value)).normalize().as_tuple().digits
  except InvalidOperation:
    return 1
  return max(1, int(''.join(map(str, digits))))
