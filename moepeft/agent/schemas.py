# SPDX-License-Identifier: Apache-2.0
"""Strict JSON schemas, as OpenAI's API wants them, of pydantic's loose ones."""

import json
from collections.abc import Mapping
from typing import Any

# Of a free object or an untyped value nothing strict can be said.
_LOOSE = ('patternProperties', 'prefixItems', 'not', 'if', 'dependentRequired')


def strict(schema: Mapping[str, Any], what: str) -> dict[str, Any]:
  """A JSON schema of pydantic's as the API wants strict ones.

  Args:
    schema: stays as it is.
    what: it is of, for the error.

  Raises:
    ValueError: it has an object with any keys, or a value of any type.
  """
  definitions = schema.get('$defs', {})
  made = _strict(schema, definitions, what)
  if definitions:
    made['$defs'] = {
      key: _strict(value, definitions, what)
      for key, value in definitions.items()
    }
  return made


def _strict(
  node: Mapping[str, Any], definitions: Mapping, what: str
) -> dict[str, Any]:
  if '$ref' in node and len(node) > 1:
    # A reference stands alone; beside a description it is written out.
    own = {key: value for key, value in node.items() if key != '$ref'}
    node = {**definitions[node['$ref'].split('/')[-1]], **own}
  made = {
    key: value
    for key, value in node.items()
    if key not in ('title', 'default', '$defs')
  }
  if any(key in made for key in _LOOSE) or not _typed(made):
    raise ValueError(
      f'{what} has a value without one type (Any, a tuple or a dict); a strict '
      'schema needs lists, dataclasses or pydantic models'
    )
  if made.get('type') == 'object':
    made |= _object(made, definitions, what)
  if 'items' in made:
    made['items'] = _strict(made['items'], definitions, what)
  for key in ('anyOf', 'oneOf', 'allOf'):
    if key in made:
      parts = [_strict(part, definitions, what) for part in made.pop(key)]
      # The API has no oneOf.
      made['allOf' if key == 'allOf' else 'anyOf'] = parts
  made.pop('discriminator', None)
  return made


def _typed(node: Mapping[str, Any]) -> bool:
  kinds = ('type', 'enum', 'const', '$ref', 'anyOf', 'oneOf', 'allOf')
  lacking = node.get('type') == 'array' and 'items' not in node
  return not lacking and any(kind in node for kind in kinds)


def _object(
  node: Mapping[str, Any], definitions: Mapping, what: str
) -> dict[str, Any]:
  if node.get('additionalProperties', False) is not False or (
    'properties' not in node and 'additionalProperties' not in node
  ):
    raise ValueError(
      f'{what} has an object with any keys (a dict); a strict schema needs a '
      'dataclass or a pydantic model'
    )
  required = node.get('required', ())
  properties = {}
  for key, value in node.get('properties', {}).items():
    made = _strict(value, definitions, what)
    if key not in required:
      made = _nullable(made, value)
    properties[key] = made
  return {
    'properties': properties,
    'required': list(properties),
    'additionalProperties': False,
  }


def _nullable(made: dict[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
  about = made.pop('description', '')
  if value.get('default') is not None:
    about = f'{about} Null for {json.dumps(value["default"])}.'.strip()
  if not _takes_null(value):
    made = {'anyOf': [made, {'type': 'null'}]}
  return {**made, 'description': about} if about else made


def _takes_null(node: Mapping[str, Any]) -> bool:
  if node.get('type') == 'null':
    return True
  return any(_takes_null(part) for part in node.get('anyOf', ()))


def without_nulls(value: Any, node: Mapping[str, Any], definitions) -> Any:
  """A value without the nulls that a strict schema has in place of defaults.

  Args:
    value: JSON that a strict schema made.
    node: the schema before it was strict.
    definitions: its `$defs`.
  """
  if '$ref' in node:
    node = definitions[node['$ref'].split('/')[-1]]
  if isinstance(value, list) and 'items' in node:
    return [without_nulls(v, node['items'], definitions) for v in value]
  for part in node.get('anyOf', ()):
    value = without_nulls(value, part, definitions)
  if not isinstance(value, dict) or 'properties' not in node:
    return value
  kept = {}
  for key, own in value.items():
    of = node['properties'].get(key, {})
    optional = key in node['properties'] and key not in node.get('required', ())
    if own is None and optional and not _takes_null(of):
      continue
    kept[key] = without_nulls(own, of, definitions)
  return kept
