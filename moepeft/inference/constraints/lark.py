# SPDX-License-Identifier: Apache-2.0
"""Grammars in llguidance's dialect of Lark."""

import json
import re
from typing import Any

from moepeft.inference import json_schema

MAX_CHARACTERS = 50_000
# %json, and the tokens that may contain it: strings, regexes and comments.
_TOKENS = re.compile(
  r'"(?:[^"\\\n]|\\.)*"|/(?![/*])(?:[^/\\\n]|\\.)+/|(?:#|//)[^\n]*|%json\b'
)


def literal(text: str) -> str:
  """Quotes a text as a literal of a rule."""
  return json.dumps(text, ensure_ascii=False).replace('\x7f', r'\u007f')


def json_rule(schema: Any, strict: bool) -> str:
  """The body of a rule for JSON that fits a schema, with bounded white space.

  Raises:
    ValueError: see `json_schema.prepare`.
  """
  return f'%json {json_schema.prepare(schema, strict)}'


def bound_white_space(text: str) -> str:
  """Bounds the white space of the JSON schemas in a user's grammar.

  Raises:
    ValueError: the grammar is too long, or a schema is invalid.
  """
  if len(text) > MAX_CHARACTERS:
    raise ValueError(
      f'the grammar has {len(text):,} characters, expected at most '
      f'{MAX_CHARACTERS:,}; make it shorter'
    )
  if text.lstrip().startswith('{'):
    raise ValueError(
      "expected rules, the first of them 'start: ...', got a JSON object; use "
      'the type json_schema for a JSON schema'
    )
  parts, position = [], 0
  while match := _TOKENS.search(text, position):
    parts.append(text[position : match.end()])
    position = match.end()
    if match[0] == '%json':
      schema, position = _read_schema(text, position)
      parts.append(' ' + json_schema.prepare(schema, True))
  return ''.join([*parts, text[position:]])


def _read_schema(text: str, position: int) -> tuple[Any, int]:
  position += len(text[position:]) - len(text[position:].lstrip())
  try:
    return json.JSONDecoder().raw_decode(text, position)
  except (ValueError, RecursionError) as e:
    raise ValueError(
      f'the grammar has no JSON schema after %json ({e}); add one'
    ) from None
