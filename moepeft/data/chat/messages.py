# SPDX-License-Identifier: Apache-2.0
"""Parses the turns of a conversation, their tool calls and the tools."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepeft.core import untrusted
from moepeft.data.row_fields import (
  BYTE_ORDER_MARK,
  BadRow,
  RowFields,
  UnusedFields,
)

# Keys for whether a turn is trained: OpenAI's, ms-swift's, axolotl's.
_LOSS_KEYS = ('weight', 'loss', 'train', 'training')
_THOUGHT_KEYS = ('reasoning_content', 'thinking', 'reasoning')
_TEXT_PARTS = ('text', 'input_text', 'output_text')
_ROLES = {
  'system': 'system',
  'developer': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'function_call': 'call',
  'tool_call': 'call',
  'tool': 'tool',
  'function': 'tool',
  'observation': 'tool',
  'tool_response': 'tool',
}


@dataclasses.dataclass(frozen=True)
class Turn:
  """A message.

  Attributes:
    role: 'system', 'user', 'assistant' or 'tool'.
    content: text; '' only for an assistant that calls tools, and for tools.
    calls: an assistant's [{'name': ..., 'arguments': {...}}], each with an
      'id' if it has one, or None.
    trained: whether the loss is on an assistant's turn.
    thought: an assistant's reasoning before its answer (`reasoning_content`).
    name: the speaker's or the tool's name.
    call_id: the id of the call that a tool answers.
  """

  role: str
  content: str
  calls: list | None = None
  trained: bool = True
  thought: str = ''
  name: str = ''
  call_id: str = ''


def parse_turns(
  items: Any, field: str, unused: UnusedFields | None = None
) -> list[Turn]:
  """Parses a list of turns; empty system turns are left out.

  Raises:
    BadRow: the value is not a list, it is empty, or a turn is malformed.
  """
  if not isinstance(items, list) or not items:
    raise BadRow(
      f'expected a list of turns in {field!r}, got {items!r}; mend or remove '
      'the row'
    )
  turns = [parse_turn(item, i, unused) for i, item in enumerate(items)]
  return [turn for turn in turns if turn.role != 'system' or turn.content]


def parse_field(
  fields: RowFields, key: str, role: str, unused: UnusedFields | None = None
) -> list[Turn]:
  """Parses a field of text (a turn of `role`), a turn, or a list of turns.

  Raises:
    BadRow: as for `parse_turns`; the message names the field.
  """
  value = fields.get(key)
  if isinstance(value, str):
    return [Turn(role, check_text(value, repr(key)))]
  if isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, list) or not value:
    raise BadRow(
      f'expected text or a list of turns in {key!r}, got {value!r}; mend or '
      'remove the row'
    )
  try:
    return parse_turns(value, key, unused)
  except BadRow as e:
    raise BadRow(f'{key!r}, {e}') from None


def parse_turn(
  item: Any, index: int, unused: UnusedFields | None = None
) -> Turn:
  """Parses one turn of {from, value} or {role, content, tool_calls}.

  Args:
    index: of the turn, for messages.
    unused: collects the names of fields that are not read.

  Raises:
    BadRow: the turn is neither, its text is empty (allowed for systems and
      tools), or a field that changes its meaning is not used.
  """
  where = f'turn {index}'
  if not isinstance(item, Mapping):
    raise BadRow(f'{where} is {item!r}, expected an object; mend the row')
  fields = RowFields(item, where, unused)
  _, name = fields.get_alias(('role', 'from'))
  if not isinstance(name, str) or name not in _ROLES:
    raise BadRow(
      f'{where} has the role {name!r}; expected one of {", ".join(_ROLES)} in '
      "'role' or 'from'"
    )
  role, calls = _ROLES[name], None
  _, content = fields.get_alias(('content', 'value'))
  if role == 'call':
    role, calls, content = 'assistant', _parse_calls(content, where), ''
  elif role == 'assistant':
    _, value = fields.get_alias(('tool_calls', 'function_call'))
    if value not in (None, '', [], {}):
      calls = _parse_calls(value, where)
  content = _join_parts(content, where)
  blank = content is None or isinstance(content, str) and not content.strip()
  # Tools with side effects often return no text.
  if blank and (calls or role in ('system', 'tool')):
    content = ''
  else:
    content = check_text(content, f'{where} ({role})')
  parsed = Turn(
    role,
    content,
    calls,
    _is_trained(fields, role, where),
    _thought(fields, role, where),
    _optional_text(fields, 'name', where),
    _optional_text(fields, 'tool_call_id', where) if role == 'tool' else '',
  )
  fields.close({content.strip()})
  return parsed


def _is_trained(fields: RowFields, role: str, where: str) -> bool:
  """Whether an assistant's turn is trained."""
  key, value = fields.get_alias(_LOSS_KEYS)
  if value in (None, ''):
    return True
  if not isinstance(value, (bool, int, float)) or value not in (0, 1):
    raise BadRow(
      f'{where} has the {key!r} {value!r}; expected 0 (not trained) or 1'
    )
  if value and role != 'assistant':
    raise BadRow(
      f'{where} has the {key!r} {value!r}, but the turn of the {role} is not '
      'trained; remove it'
    )
  return role != 'assistant' or bool(value)


def _thought(fields: RowFields, role: str, where: str) -> str:
  """An assistant's reasoning before its answer; '' if there is none."""
  key, value = fields.get_alias(_THOUGHT_KEYS)
  if value in (None, ''):
    return ''
  if role != 'assistant':
    raise BadRow(
      f'{where} has {key!r}, which only the assistant has; remove it'
    )
  return check_text(value, f'{where}, {key!r}')


def _optional_text(fields: RowFields, key: str, where: str) -> str:
  value = fields.get(key, '')
  return value and check_text(value, f'{where}, {key!r}')


def _join_parts(content: Any, where: str) -> Any:
  """Joins OpenAI's lists of text parts to one text."""
  if not isinstance(content, list):
    return content
  texts = []
  for part in content:
    fields = RowFields(part if isinstance(part, Mapping) else {}, where)
    value = fields.get('text')
    if fields.get('type', 'text') not in _TEXT_PARTS or not isinstance(
      value, str
    ):
      raise BadRow(
        f'{where} holds something other than text; only text can be trained: '
        'remove the row'
      )
    fields.close()
    texts.append(value)
  return ''.join(texts)


def check_text(value: Any, name: str) -> str:
  """Returns a text without its byte order mark.

  Args:
    name: the value's name in messages.

  Raises:
    BadRow: the value is not text, it is empty, or it has a lone surrogate.
  """
  if not isinstance(value, str):
    raise BadRow(f'{name} is {value!r}, expected text; mend or remove the row')
  value = value.removeprefix(BYTE_ORDER_MARK)
  if not value.strip():
    raise BadRow(f'{name} is empty; fill it in, or remove the row')
  if not value.isascii() and any('\ud800' <= c <= '\udfff' for c in value):
    raise BadRow(f'{name} holds half of a character; mend or remove the row')
  return value


def _parse_calls(value: Any, where: str) -> list[dict]:
  """[{'name', 'arguments'}] of JSON, a call, or OpenAI's list of calls."""
  parsed = _parse_json(value, where, 'a call of a tool')
  parsed = parsed if isinstance(parsed, list) else [parsed]
  calls = []
  for item in parsed or [{}]:
    outer = RowFields(item if isinstance(item, Mapping) else {}, where)
    inner = outer.get('function')
    call = RowFields(inner, where) if isinstance(inner, Mapping) else outer
    name, arguments = call.get('name'), call.get('arguments')
    arguments = _parse_json(arguments, where, 'arguments') if arguments else {}
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
      raise BadRow(
        f"{where} calls no tool: expected {{'name': ..., 'arguments': "
        f'{{...}}}}, got {value!r}; mend or remove the row'
      )
    call_id = outer.get('id', '')
    if not isinstance(call_id, str):
      raise BadRow(
        f"{where} has the 'id' {call_id!r} of a call, expected text; mend or "
        'remove the row'
      )
    calls.append(
      {'name': name, 'arguments': arguments}
      | ({'id': call_id} if call_id else {})
    )
  return calls


def parse_tools(fields: RowFields) -> list[dict] | None:
  """A row's tools in OpenAI's format, or None.

  Raises:
    BadRow: they are not a list of JSON schemas.
  """
  key, value = fields.get_alias(('tools', 'functions'))
  if value in (None, '', []):
    return None
  parsed = _parse_json(value, repr(key), 'a list of tools')
  if parsed == []:
    return None
  if not isinstance(parsed, list):
    raise _bad_tools(key, value)
  tools = []
  for item in parsed:
    # Some exports encode each tool as JSON text.
    tool = _parse_json(item, repr(key), 'a tool')
    if not isinstance(tool, dict):
      raise _bad_tools(key, value)
    if 'function' not in tool:
      tool = {'type': 'function', 'function': tool}
    if not isinstance(tool['function'], dict):
      raise _bad_tools(key, value)
    tools.append(tool)
  return tools


def _bad_tools(key: str, value: Any) -> BadRow:
  return BadRow(
    f'expected a list of JSON schemas in {key!r}, got {value!r}; mend or '
    'remove the row'
  )


def _parse_json(value: Any, where: str, description: str) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return untrusted.parse_json(value)
  except untrusted.Malformed as e:
    raise BadRow(
      f'{where} holds no JSON of {description} ({e}); mend or remove the row'
    ) from None
