# SPDX-License-Identifier: Apache-2.0
"""One turn of a conversation, and the tools that it may call."""

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

# Spellings of whether a turn is trained: OpenAI's, ms-swift's, axolotl's.
_LOSS = ('weight', 'loss', 'train', 'training')
_THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')
# Kinds of parts that are text.
_PARTS = ('text', 'input_text', 'output_text')
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
  """A message of one side.

  Attributes:
    role: 'system', 'user', 'assistant' or 'tool'.
    content: not empty, but for an assistant that calls tools, and of tools.
    calls: [{'name': ..., 'arguments': {...}}] of an assistant, with an 'id'
      where it has one, or None.
    trained: whether an assistant's is trained (`weight`, `loss`, `train`).
    thought: of an assistant, before it answers (`reasoning_content`).
    name: of who speaks, or of the tool.
    call_id: of the call that a tool answers.
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
  """The turns of a list; a system's turn without a text is none.

  Raises:
    BadRow: it is no list, it is empty, or a turn is not of its form.
  """
  if not isinstance(items, list) or not items:
    raise BadRow(
      f'expected a list of turns in {field!r}, got {items!r}; mend or remove '
      'the row'
    )
  every = [parse_turn(item, i, unused) for i, item in enumerate(items)]
  return [t for t in every if t.role != 'system' or t.content]


def parse_field(
  fields: RowFields, key: str, role: str, unused: UnusedFields | None = None
) -> list[Turn]:
  """A field's turns: a text is one of `role`, an object one of its own.

  Raises:
    BadRow: as `turns`; the message names the field.
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
  item: Any, place: int, unused: UnusedFields | None = None
) -> Turn:
  """One turn of {from, value} or {role, content, tool_calls}.

  Args:
    unused: told of the fields that are not read.

  Raises:
    BadRow: it is neither, it is empty (a system's or a tool's aside), or has
      a field that changes its meaning and cannot be used.
  """
  where = f'turn {place}'
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
    role, calls, content = 'assistant', _calls(content, where), ''
  elif role == 'assistant':
    _, value = fields.get_alias(('tool_calls', 'function_call'))
    if value not in (None, '', [], {}):
      calls = _calls(value, where)
  content = _joined(content, where)
  blank = content is None or isinstance(content, str) and not content.strip()
  # Tools that do something often have nothing to tell.
  if blank and (calls or role in ('system', 'tool')):
    content = ''
  else:
    content = check_text(content, f'{where} ({role})')
  parsed = Turn(
    role,
    content,
    calls,
    _trained(fields, role, where),
    _thought(fields, role, where),
    _label(fields, 'name', where),
    _label(fields, 'tool_call_id', where) if role == 'tool' else '',
  )
  fields.close({content.strip()})
  return parsed


def _trained(fields: RowFields, role: str, where: str) -> bool:
  """Whether an assistant's turn is trained."""
  key, value = fields.get_alias(_LOSS)
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
  """An assistant's thoughts before its answer, '' if there are none."""
  key, value = fields.get_alias(_THOUGHTS)
  if value in (None, ''):
    return ''
  if role != 'assistant':
    raise BadRow(
      f'{where} has {key!r}, which only the assistant has; remove it'
    )
  return check_text(value, f'{where}, {key!r}')


def _label(fields: RowFields, key: str, where: str) -> str:
  value = fields.get(key, '')
  return value and check_text(value, f'{where}, {key!r}')


def _joined(content: Any, where: str) -> Any:
  """OpenAI's lists of parts as one text."""
  if not isinstance(content, list):
    return content
  texts = []
  for part in content:
    fields = RowFields(part if isinstance(part, Mapping) else {}, where)
    value = fields.get('text')
    if fields.get('type', 'text') not in _PARTS or not isinstance(value, str):
      raise BadRow(
        f'{where} holds something other than text; only text can be trained: '
        'remove the row'
      )
    fields.close()
    texts.append(value)
  return ''.join(texts)


def check_text(value: Any, name: str) -> str:
  """A value that is text and not empty, without a byte order mark.

  Raises:
    BadRow: it is not; `said` names it.
  """
  if not isinstance(value, str):
    raise BadRow(f'{name} is {value!r}, expected text; mend or remove the row')
  value = value.removeprefix(BYTE_ORDER_MARK)
  if not value.strip():
    raise BadRow(f'{name} is empty; fill it in, or remove the row')
  if not value.isascii() and any('\ud800' <= c <= '\udfff' for c in value):
    raise BadRow(f'{name} holds half of a character; mend or remove the row')
  return value


def _calls(value: Any, where: str) -> list[dict]:
  """[{'name', 'arguments'}] of JSON or of OpenAI's list."""
  parsed = _json(value, where, 'a call of a tool')
  parsed = parsed if isinstance(parsed, list) else [parsed]
  calls = []
  for item in parsed or [{}]:
    outer = RowFields(item if isinstance(item, Mapping) else {}, where)
    inner = outer.get('function')
    call = RowFields(inner, where) if isinstance(inner, Mapping) else outer
    name, arguments = call.get('name'), call.get('arguments')
    arguments = _json(arguments, where, 'arguments') if arguments else {}
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
  """A row's tools, in OpenAI's form.

  Raises:
    BadRow: they are no list of JSON schemas.
  """
  key, value = fields.get_alias(('tools', 'functions'))
  if value in (None, '', []):
    return None
  parsed = _json(value, repr(key), 'a list of tools')
  if parsed == []:
    return None
  if not isinstance(parsed, list):
    raise _no_tools(key, value)
  every = []
  for item in parsed:
    # Some exports write each tool as JSON.
    tool = _json(item, repr(key), 'a tool')
    if not isinstance(tool, dict):
      raise _no_tools(key, value)
    tool = (
      tool if 'function' in tool else {'type': 'function', 'function': tool}
    )
    function = tool['function']
    if not isinstance(function, dict):
      raise _no_tools(key, value)
    every.append(tool)
  return every


def _no_tools(key: str, value: Any) -> BadRow:
  return BadRow(
    f'expected a list of JSON schemas in {key!r}, got {value!r}; mend or '
    'remove the row'
  )


def _json(value: Any, where: str, description: str) -> Any:
  if not isinstance(value, str):
    return value
  try:
    return untrusted.parse_json(value)
  except untrusted.Malformed as e:
    raise BadRow(
      f'{where} holds no JSON of {description} ({e}); mend or remove the row'
    ) from None
