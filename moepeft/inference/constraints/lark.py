# SPDX-License-Identifier: Apache-2.0
"""Grammars in llguidance's kind of Lark: literals, and bounds on users' own."""

import json
import re
from typing import Any

from moepeft.inference import json_schema

CHARACTERS = 50_000
# What may hold '%json' without meaning it: texts, expressions and comments.
_PARTS = re.compile(
  r'"(?:[^"\\\n]|\\.)*"|/(?![/*])(?:[^/\\\n]|\\.)+/|(?:#|//)[^\n]*|%json\b'
)


def literal(text: str) -> str:
  """A text as it stands in a rule.

  Letters that no line may hold are spelled out.
  """
  return json.dumps(text, ensure_ascii=False).replace('\x7f', r'\u007f')


def json_rule(schema: Any, strict: bool) -> str:
  """A rule's body: JSON that fits a schema, its white space bounded.

  Raises:
    ValueError: as `json_schemas.prepared` does.
  """
  return f'%json {json_schema.prepared(schema, strict)}'


def bounded(text: str) -> str:
  """A user's grammar whose JSON schemas have bounded white space.

  Raises:
    ValueError: it is too long, or a schema in it cannot be kept.
  """
  if len(text) > CHARACTERS:
    raise ValueError(
      f'the grammar has {len(text):,} characters, expected at most '
      f'{CHARACTERS:,}; make it shorter'
    )
  if text.lstrip().startswith('{'):
    raise ValueError(
      "a grammar is rules, the first of them 'start: ...', got a JSON object; "
      'give a JSON schema by its own option'
    )
  parts, at = [], 0
  while match := _PARTS.search(text, at):
    parts.append(text[at : match.end()])
    at = match.end()
    if match[0] == '%json':
      schema, at = _schema(text, at)
      parts.append(' ' + json_schema.prepared(schema, True))
  return ''.join([*parts, text[at:]])


def _schema(text: str, at: int) -> tuple[Any, int]:
  at += len(text[at:]) - len(text[at:].lstrip())
  try:
    return json.JSONDecoder().raw_decode(text, at)
  except (ValueError, RecursionError) as e:
    raise ValueError(
      f'the grammar has no JSON schema after its %json ({e}); mend it'
    ) from None
