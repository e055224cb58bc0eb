# SPDX-License-Identifier: Apache-2.0
"""Conversations in the forms that people have: alpaca, sharegpt, messages.

alpaca: `instruction`, `input`, `output` (Dolly: `context`, `response`), and
perhaps `history` (pairs of a question and an answer). sharegpt:
`conversations` of {from, value}. messages: OpenAI's, `messages` of {role,
content, tool_calls}, or TRL's `prompt` and `completion` (or `response`), of
which the latter is trained. All may have `system` and `tools` (or
`functions`); an assistant's turn may have a `weight`, `loss` or `train` (0 is
not trained, 1 is), a `function_call` and `reasoning_content` or `thinking`.
Other fields are the subject of `moepeft.data.row_fields`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moepeft.data import fingerprint
from moepeft.data.chat import messages
from moepeft.data.chat.messages import Turn, check_text, parse_tools
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import dataset_rows
from moepeft.data.row_fields import RowFields, UnusedFields

FORMS = ('alpaca', 'sharegpt', 'messages')
# Alpaca's names and Dolly's.
_INPUTS, _ANSWERS = ('input', 'context'), ('output', 'response')
_COMPLETIONS = ('completion', 'response')
# A row's own field for the system's text, in the spellings of exports.
_SYSTEM = ('system', 'system_prompt', 'system_message')


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns, the system's first if there is one; tools as JSON schemas."""

  turns: tuple[Turn, ...]
  tools: list | None = None

  @property
  def answered(self) -> bool:
    return bool(self.turns) and self.turns[-1].role == 'assistant'


def read_rows(path: str, bad: BadRows) -> Iterator[tuple[str, str, dict]]:
  """(file, 'FILE, row 0', row) of a file or a directory of them.

  Raises:
    ValueError: nothing is there, a file cannot be read, or as `bad` does.
  """
  for file in fingerprint.data_files(path, fingerprint.CHAT_FILES, bad):
    for where, row in zip(*dataset_rows.read_json_rows(file, bad), strict=True):
      yield file, where, row


def check_answered(conversation: Conversation) -> Conversation:
  """The same.

  Raises:
    BadRow: it does not end with an answer.
  """
  if not conversation.answered:
    raise BadRow(
      f"the last turn is the {conversation.turns[-1].role}'s, expected an "
      'answer of the assistant; add it, or remove the row'
    )
  return conversation


def form_of(row: Mapping) -> str:
  """The form that a row's fields are of.

  Raises:
    BadRow: it is none.
  """
  for key, form in (
    ('messages', 'messages'),
    ('conversations', 'sharegpt'),
    ('instruction', 'alpaca'),
  ):
    if key in row:
      return form
  if 'prompt' in row and any(key in row for key in _COMPLETIONS):
    return 'messages'
  raise BadRow(
    f'the row has {", ".join(map(repr, row)) or "no fields"}; expected '
    "'messages', 'conversations', 'instruction' and 'output', or 'prompt' and "
    "'completion'"
  )


def check_form(form: str) -> None:
  """Raises ValueError where config.data.format is none of FORMS, nor empty."""
  if form and form not in FORMS:
    raise ValueError(
      f'config.data.format is one of {", ".join(FORMS)}, or empty to find out; '
      f'got {form!r}'
    )


def parse_conversation(
  row: Mapping, form: str = '', unused: UnusedFields | None = None
) -> Conversation:
  """A row's conversation, which need not end with an answer.

  Args:
    form: one of FORMS, '' to find out by the fields.
    unused: told of the fields that are not read.

  Raises:
    BadRow: the row is not of the form, or has a field that changes its
      meaning and cannot be used.
    ValueError: there is no such form.
  """
  check_form(form)
  fields = RowFields(row, unused=unused)
  kind = form or form_of(fields)
  if kind == 'alpaca':
    turns = alpaca_prompt(fields)
    key, answer = fields.get_alias(_ANSWERS)
    turns.append(Turn('assistant', check_text(answer, repr(key or 'output'))))
  elif kind == 'sharegpt':
    turns = messages.parse_turns(
      fields.get('conversations'), 'conversations', unused
    )
  elif 'messages' not in fields and 'prompt' in fields:
    turns = _completed(fields, unused)
  else:
    turns = messages.parse_turns(fields.get('messages'), 'messages', unused)
  if kind != 'alpaca':
    turns = with_system(turns, fields)
  check_order(turns)
  conversation = Conversation(tuple(turns), parse_tools(fields))
  fields.close(turn_texts(turns))
  for turn in turns if unused is not None else ():
    unused.see(turn.content)
  return conversation


def turn_texts(turns: Iterable[Turn]) -> set[str]:
  """Texts of turns, stripped; an instruction and its input apart, too."""
  texts = {turn.content.strip() for turn in turns}
  parts = {part for whole in texts for part in whole.split('\n', 1)}
  return texts | {part.strip() for part in parts}


def alpaca_prompt(fields: RowFields) -> list[Turn]:
  """The turns of an alpaca row up to its question."""
  turns = with_system(_history(fields), fields)
  question = check_text(fields.get('instruction'), "'instruction'")
  key, more = fields.get_alias(_INPUTS)
  if more is not None and not _is_blank(more):
    question += '\n' + check_text(more, repr(key))
  return [*turns, Turn('user', question)]


def _history(fields: RowFields) -> list[Turn]:
  """The exchanges before the question of an alpaca row."""
  history, turns = fields.get('history', ''), []
  if history == '':
    return []
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
    where = f"'history', pair {i},"
    turns += [Turn('user', check_text(pair[0], where))]
    turns += [Turn('assistant', check_text(pair[1], where))]
  return turns


def _completed(fields: RowFields, unused: UnusedFields | None) -> list[Turn]:
  """TRL's prompt and completion, of which the completion is trained."""
  prompt = messages.parse_field(fields, 'prompt', 'user', unused)
  key, _ = fields.get_alias(_COMPLETIONS)
  answer = messages.parse_field(fields, key, 'assistant', unused)
  return [
    dataclasses.replace(turn, trained=turn.role != 'assistant')
    for turn in prompt
  ] + answer


def _is_blank(value: Any) -> bool:
  return isinstance(value, str) and not value.strip()


def with_system(turns: list[Turn], fields: RowFields) -> list[Turn]:
  """The turns after the system's that a row gives in its own field.

  Raises:
    BadRow: it is no text, or the turns begin with another system's.
  """
  key, system = fields.get_alias(_SYSTEM)
  if system is None or _is_blank(system):
    return turns
  first = Turn('system', check_text(system, repr(key)))
  if not turns or turns[0].role != 'system':
    return [first, *turns]
  if turns[0].content != first.content:
    raise BadRow(
      f"the row has one system's text in {key!r} and another as its first "
      'turn; remove one of them'
    )
  return turns


def check_order(turns: Sequence[Turn]) -> None:
  """The system first, then the user; tools answer the assistant.

  Raises:
    BadRow: the order is another.
  """
  begun = turns[1:] if turns and turns[0].role == 'system' else turns
  if not begun or begun[0].role != 'user':
    who = begun[0].role if begun else 'nobody'
    raise BadRow(
      f"a conversation begins with the user's turn, after the system's if "
      f'there is one; this one with the turn of {who}'
    )
  for i, (previous, now) in enumerate(
    zip(begun, begun[1:], strict=False), len(turns) - len(begun) + 1
  ):
    if now.role == 'system':
      raise BadRow(f'turn {i} is of the system, which may only be the first')
    if now.role == 'tool' and previous.role not in ('assistant', 'tool'):
      raise BadRow(
        f'turn {i} is of a tool and follows the {previous.role}, expected a '
        'call of the assistant before it'
      )
    if now.role == 'tool' and not (previous.role == 'tool' or _calls(previous)):
      raise BadRow(
        f'turn {i} is of a tool, but the assistant called none before it; give '
        "its call in 'tool_calls' or a turn of 'function_call', or remove the "
        'row'
      )


def _calls(turn: Turn) -> bool:
  """Whether it calls a tool, or may do so in its own words (in JSON)."""
  return bool(turn.calls) or '{' in turn.content or '[' in turn.content
