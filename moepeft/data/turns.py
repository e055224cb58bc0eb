# SPDX-License-Identifier: Apache-2.0
"""One turn of a conversation, and the tools that it may call."""

import dataclasses
import json
from typing import Any

from moepeft.data.rows import BadRow

_ROLES = {
  'system': 'system',
  'developer': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
  'function_call': 'call',
  'tool': 'tool',
  'function': 'tool',
  'observation': 'tool',
}


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one side says.

  Attributes:
    role: 'system', 'user', 'assistant' or 'tool'.
    content: not empty, but for an assistant that calls tools.
    calls: [{'name': ..., 'arguments': {...}}] of an assistant, or None.
    trained: whether an assistant's is trained (OpenAI's `weight`).
    thought: of an assistant, before it answers (`reasoning_content`).
  """

  role: str
  content: str
  calls: list | None = None
  trained: bool = True
  thought: str = ''


def turn(item: Any, place: int) -> Turn:
  """One turn of {from, value} or {role, content, tool_calls}.

  Raises:
    BadRow: it is neither, or empty.
  """
  said = f'turn {place}'
  if not isinstance(item, dict):
    raise BadRow(f'{said} is {item!r}, expected an object; mend the row')
  name = item.get('role', item.get('from'))
  if not isinstance(name, str) or name not in _ROLES:
    raise BadRow(
      f'{said} has the role {name!r}; expected one of {", ".join(_ROLES)} in '
      "'role' or 'from'"
    )
  role, content = _ROLES[name], item.get('content', item.get('value'))
  if role == 'call':
    return Turn('assistant', '', _calls(content, said))
  calls, trained = None, _weight(item, role, said)
  thought = _thought(item, role, said)
  if role == 'assistant' and item.get('tool_calls'):
    calls = _calls(item['tool_calls'], said)
    if content in (None, ''):
      return Turn(role, '', calls, trained, thought)
  content = text(_joined(content, said), f'{said} ({role})')
  return Turn(role, content, calls, trained, thought)


def _weight(item: dict, role: str, said: str) -> bool:
  """Whether an assistant's turn is trained."""
  weight = item.get('weight')
  if weight is None:
    return True
  if isinstance(weight, bool) or weight not in (0, 1):
    raise BadRow(
      f"{said} has the 'weight' {weight!r}; expected 0 (not trained) or 1"
    )
  if weight and role != 'assistant':
    raise BadRow(
      f"{said} has the 'weight' 1, but the turn of the {role} is not trained; "
      'remove it'
    )
  return role != 'assistant' or bool(weight)


def _thought(item: dict, role: str, said: str) -> str:
  """What an assistant thinks before it answers, '' if nothing."""
  for key in ('reasoning_content', 'thinking'):
    value = item.get(key)
    if value in (None, ''):
      continue
    if role != 'assistant':
      raise BadRow(
        f'{said} has {key!r}, which only the assistant has; remove it'
      )
    return text(value, f'{said}, {key!r}')
  return ''


def _joined(content: Any, said: str) -> Any:
  """OpenAI's lists of parts as one text."""
  if not isinstance(content, list):
    return content
  texts = [p.get('text') for p in content if isinstance(p, dict)]
  if len(texts) < len(content) or not all(isinstance(t, str) for t in texts):
    raise BadRow(
      f'{said} holds something other than text; only text can be trained: '
      'remove the row'
    )
  return ''.join(texts)


def text(value: Any, said: str) -> str:
  """A value that is text and not empty.

  Raises:
    BadRow: it is not; `said` names it.
  """
  if not isinstance(value, str):
    raise BadRow(f'{said} is {value!r}, expected text; mend or remove the row')
  if not value.strip():
    raise BadRow(f'{said} is empty; fill it in, or remove the row')
  if not value.isascii() and any('\ud800' <= c <= '\udfff' for c in value):
    raise BadRow(f'{said} holds half of a character; mend or remove the row')
  return value


def _calls(value: Any, said: str) -> list[dict]:
  """[{'name', 'arguments'}] of JSON or of OpenAI's list."""
  found = _json(value, said, 'a call of a tool')
  found = found if isinstance(found, list) else [found]
  calls = []
  for call in found or [{}]:
    call = call.get('function', call) if isinstance(call, dict) else {}
    call = call if isinstance(call, dict) else {}
    arguments = _json(call.get('arguments', {}), said, 'arguments')
    if not isinstance(call.get('name'), str) or not isinstance(arguments, dict):
      raise BadRow(
        f"{said} calls no tool: expected {{'name': ..., 'arguments': "
        f'{{...}}}}, got {value!r}; mend or remove the row'
      )
    calls.append({'name': call['name'], 'arguments': arguments})
  return calls


def tools(value: Any) -> list[dict] | None:
  """A row's tools, in OpenAI's form.

  Raises:
    BadRow: they are no list of JSON schemas.
  """
  if value in (None, '', [], '[]'):
    return None
  found = _json(value, "'tools'", 'a list of tools')
  if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
    raise BadRow(
      f"expected a list of JSON schemas in 'tools', got {value!r}; mend or "
      'remove the row'
    )
  return [
    t if 'function' in t else {'type': 'function', 'function': t} for t in found
  ]


def _json(value: Any, said: str, what: str) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except (ValueError, RecursionError) as e:
    raise BadRow(
      f'{said} holds no JSON of {what} ({getattr(e, "msg", e)}); mend or '
      'remove the row'
    ) from None
