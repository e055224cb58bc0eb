# SPDX-License-Identifier: Apache-2.0
"""Conversations in the forms that people have: alpaca, sharegpt, messages.

alpaca: `instruction`, `input`, `output`, and perhaps `system` and `history`
(pairs of a question and an answer). sharegpt: `conversations` of {from, value}
and perhaps `system` and `tools`. messages: OpenAI's, `messages` of {role,
content, tool_calls}, and perhaps `tools`; an assistant's turn may have a
`weight` (0 is not trained, 1 is) and `reasoning_content` or `thinking`.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moepeft.core.files import local_path
from moepeft.data import hub, jsonl
from moepeft.data.rows import Bad, BadRow
from moepeft.data.turns import Turn, text, tools, turn

FORMS = ('alpaca', 'sharegpt', 'messages')
_OTHER = re.compile('test|valid|dev|eval')
_ENDS = ('.json', '.jsonl', '.json.gz', '.jsonl.gz')


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns, the system's first if there is one; tools as JSON schemas."""

  turns: tuple[Turn, ...]
  tools: list | None = None

  @property
  def answered(self) -> bool:
    return bool(self.turns) and self.turns[-1].role == 'assistant'


def rows(path: str, bad: Bad) -> Iterator[tuple[str, str, dict]]:
  """(file, 'FILE, row 0', row) of a file or a directory of them.

  Raises:
    ValueError: nothing is there, a file cannot be read, or as `bad` does.
  """
  path = local_path(path)
  for file in _files(path):
    for where, row in zip(*hub.json_rows(file, bad), strict=True):
      yield file, where, row


def of_json(path: str) -> bool:
  """Whether a path is a directory whose files are all of rows as JSON.

  Not so where a file's name says that it is of another split than 'train',
  which `datasets` tells apart.
  """
  path = local_path(path)
  names = os.listdir(path) if os.path.isdir(path) else []
  names = [name for name in names if not name.startswith('.')]
  return bool(names) and all(
    name.endswith(_ENDS) and not _OTHER.search(name) for name in names
  )


def _files(path: str) -> list[str]:
  kinds = ', '.join(_ENDS)
  if os.path.isfile(path):
    if not path.endswith(_ENDS):
      raise ValueError(
        f'conversations are read from {kinds}; got {path!r}: convert it, or '
        'name a directory of such files'
      )
    return [path]
  if not os.path.isdir(path):
    raise ValueError(
      f'{path!r} does not exist; name a file of {kinds}, or a directory of them'
    )
  found = [f for f in sorted(os.listdir(path)) if f.endswith(_ENDS)]
  if not found:
    raise ValueError(f'{path} holds no file of {kinds}')
  return jsonl.check_files([os.path.join(path, f) for f in found])


def conversations(path: str, form: str = '') -> list[Conversation]:
  """All conversations under a path, each ending with an answer.

  Raises:
    ValueError: nothing is there, or a row is not of its form; the message
      names the file and the row.
  """
  bad, found = Bad('error'), []
  for _, where, row in rows(path, bad):
    try:
      found.append(answered(conversation(row, form)))
    except BadRow as e:
      bad(where, e)
  return found


def answered(found: Conversation) -> Conversation:
  """The same.

  Raises:
    BadRow: it does not end with an answer.
  """
  if not found.answered:
    raise BadRow(
      f"the last turn is the {found.turns[-1].role}'s, expected an answer of "
      'the assistant; add it, or remove the row'
    )
  return found


def form_of(row: Mapping) -> str:
  """The form that a row's fields are of.

  Raises:
    BadRow: it is none.
  """
  if 'messages' in row:
    return 'messages'
  if 'conversations' in row:
    return 'sharegpt'
  if 'instruction' in row:
    return 'alpaca'
  raise BadRow(
    f'the row has {", ".join(map(repr, row)) or "no fields"}; expected '
    "'messages', 'conversations' or 'instruction' and 'output'"
  )


def conversation(row: Mapping, form: str = '') -> Conversation:
  """A row's conversation, which need not end with an answer.

  Args:
    form: one of FORMS, '' to find out by the fields.

  Raises:
    BadRow: the row is not of the form.
    ValueError: there is no such form.
  """
  if form and form not in FORMS:
    raise ValueError(
      f'config.data.form is one of {", ".join(FORMS)}, or empty to find out; '
      f'got {form!r}'
    )
  kind = form or form_of(row)
  if kind == 'alpaca':
    turns = _alpaca(row)
  else:
    turns = _listed(row, 'messages' if kind == 'messages' else 'conversations')
  check_order(turns)
  return Conversation(tuple(turns), tools(row.get('tools')))


def _alpaca(row: Mapping) -> list[Turn]:
  system = row.get('system') or ''
  turns = [Turn('system', text(system, "'system'"))] if system else []
  history = row.get('history') or []
  if not isinstance(history, list):
    raise BadRow(
      f"expected a list of pairs in 'history', got {history!r}; mend or remove "
      'the row'
    )
  for i, pair in enumerate(history):
    if not isinstance(pair, list) or len(pair) != 2:
      raise BadRow(
        f"expected pairs of texts in 'history', got {pair!r}; mend or remove "
        'the row'
      )
    said = f"'history', pair {i},"
    turns += [Turn('user', text(pair[0], said))]
    turns += [Turn('assistant', text(pair[1], said))]
  asked = text(row.get('instruction'), "'instruction'")
  more = row.get('input') or ''
  if more:
    asked += '\n' + text(more, "'input'")
  answer = text(row.get('output'), "'output'")
  return [*turns, Turn('user', asked), Turn('assistant', answer)]


def _listed(row: Mapping, field: str) -> list[Turn]:
  """The turns of a row's list, in either spelling."""
  items = row.get(field)
  if not isinstance(items, list) or not items:
    raise BadRow(
      f'expected a list of turns in {field!r}, got {items!r}; mend or remove '
      'the row'
    )
  turns = [turn(item, i) for i, item in enumerate(items)]
  return with_system(turns, row.get('system'))


def with_system(turns: list[Turn], system: Any) -> list[Turn]:
  """The turns after the system's that a row gives in its own field.

  Raises:
    BadRow: it is no text, or the turns begin with another system's.
  """
  if not system:
    return turns
  first = Turn('system', text(system, "'system'"))
  if not turns or turns[0].role != 'system':
    return [first, *turns]
  if turns[0].content != first.content:
    raise BadRow(
      "the row has one system's text in 'system' and another as its first "
      'turn; remove one of them'
    )
  return turns


def check_order(turns: Sequence[Turn]) -> None:
  """The system first, then the user; tools answer the assistant.

  Raises:
    BadRow: the order is another.
  """
  begun = turns[1:] if turns[0].role == 'system' else turns
  if not begun or begun[0].role != 'user':
    who = begun[0].role if begun else 'nobody'
    raise BadRow(
      f"a conversation begins with the user's turn, after the system's if "
      f'there is one; this one with the turn of {who}'
    )
  for i, (before, now) in enumerate(
    zip(begun, begun[1:], strict=False), len(turns) - len(begun) + 1
  ):
    if now.role == 'system':
      raise BadRow(f'turn {i} is of the system, which may only be the first')
    if now.role == 'tool' and before.role not in ('assistant', 'tool'):
      raise BadRow(
        f'turn {i} is of a tool and follows the {before.role}, expected a call '
        'of the assistant before it'
      )
    if now.role == 'tool' and not (before.role == 'tool' or _calls(before)):
      raise BadRow(
        f'turn {i} is of a tool, but the assistant called none before it; give '
        "its call in 'tool_calls' or a turn of 'function_call', or remove the "
        'row'
      )


def _calls(turn: Turn) -> bool:
  """Whether it calls a tool, or may do so in its own words (in JSON)."""
  return bool(turn.calls) or '{' in turn.content or '[' in turn.content
