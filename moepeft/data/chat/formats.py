# SPDX-License-Identifier: Apache-2.0
"""Parses conversations in the formats alpaca, sharegpt and messages.

alpaca: `instruction`, `input`, `output` (Dolly: `context`, `response`), and
optionally `history` (pairs of a question and an answer). sharegpt:
`conversations` of {from, value}. messages: OpenAI's, `messages` of {role,
content, tool_calls}, or TRL's `prompt` and `completion` (or `response`), of
which the completion is trained. All may have `system` and `tools` (or
`functions`). An assistant's turn may have a `weight`, `loss` or `train` (0 for
no loss on it, or 1), a `function_call` and `reasoning_content` or `thinking`.
`moepeft.data.row_fields` refuses or lists all other fields.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moepeft.data import fingerprint
from moepeft.data.chat import messages
from moepeft.data.chat.messages import Turn, check_text, parse_tools
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import dataset_rows
from moepeft.data.row_fields import RowFields, UnusedFields

FORMATS = ('alpaca', 'sharegpt', 'messages')
# Alpaca's keys and Dolly's.
_INPUT_KEYS, _OUTPUT_KEYS = ('input', 'context'), ('output', 'response')
_COMPLETION_KEYS = ('completion', 'response')
_SYSTEM_KEYS = ('system', 'system_prompt', 'system_message')


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A conversation.

  Attributes:
    turns: the turns; a system turn comes first.
    tools: JSON schemas of the tools, or None.
  """

  turns: tuple[Turn, ...]
  tools: list | None = None

  @property
  def ends_with_answer(self) -> bool:
    return bool(self.turns) and self.turns[-1].role == 'assistant'


def read_rows(path: str, bad: BadRows) -> Iterator[tuple[str, str, dict]]:
  """Yields (file, 'FILE, row 0', row) of a file or of a directory's files.

  Raises:
    ValueError: there is no file, a file cannot be read, or `bad` raises.
  """
  for file in fingerprint.data_files(path, fingerprint.CHAT_FILES, bad):
    for where, row in zip(*dataset_rows.read_json_rows(file, bad), strict=True):
      yield file, where, row


def check_answered(conversation: Conversation) -> Conversation:
  """Returns the conversation.

  Raises:
    BadRow: it does not end with an answer of the assistant.
  """
  if not conversation.ends_with_answer:
    raise BadRow(
      f"the last turn is the {conversation.turns[-1].role}'s, expected an "
      'answer of the assistant; add it, or remove the row'
    )
  return conversation


def infer_format(row: Mapping) -> str:
  """The format of a row, by its keys.

  Raises:
    BadRow: they are not those of any format.
  """
  for key, row_format in (
    ('messages', 'messages'),
    ('conversations', 'sharegpt'),
    ('instruction', 'alpaca'),
  ):
    if key in row:
      return row_format
  if 'prompt' in row and any(key in row for key in _COMPLETION_KEYS):
    return 'messages'
  raise BadRow(
    f'the row has {", ".join(map(repr, row)) or "no fields"}; expected '
    "'messages', 'conversations', 'instruction' and 'output', or 'prompt' and "
    "'completion'"
  )


def check_format(row_format: str) -> None:
  """Raises ValueError if config.data.format is neither in FORMATS nor empty."""
  if row_format and row_format not in FORMATS:
    raise ValueError(
      f'config.data.format is one of {", ".join(FORMATS)}, or empty to find '
      f'out; got {row_format!r}'
    )


def parse_conversation(
  row: Mapping, row_format: str = '', unused: UnusedFields | None = None
) -> Conversation:
  """Parses a row's conversation, which need not end with an answer.

  Args:
    row_format: one of FORMATS; '' to infer it from the keys.
    unused: collects the names of fields that are not read.

  Raises:
    BadRow: the row is not in the format, or a field that changes its meaning
      is not used.
    ValueError: there is no such format.
  """
  check_format(row_format)
  fields = RowFields(row, unused=unused)
  row_format = row_format or infer_format(fields)
  if row_format == 'alpaca':
    turns = alpaca_prompt(fields)
    key, answer = fields.get_alias(_OUTPUT_KEYS)
    turns.append(Turn('assistant', check_text(answer, repr(key or 'output'))))
  elif row_format == 'sharegpt':
    turns = messages.parse_turns(
      fields.get('conversations'), 'conversations', unused
    )
  elif 'messages' not in fields and 'prompt' in fields:
    turns = _prompt_and_completion(fields, unused)
  else:
    turns = messages.parse_turns(fields.get('messages'), 'messages', unused)
  if row_format != 'alpaca':
    turns = with_system(turns, fields)
  check_order(turns)
  conversation = Conversation(tuple(turns), parse_tools(fields))
  fields.close(turn_texts(turns))
  for turn in turns if unused is not None else ():
    unused.add_media(turn.content)
  return conversation


def turn_texts(turns: Iterable[Turn]) -> set[str]:
  """The stripped texts of turns, and their first line and other lines apart.

  An alpaca turn is an instruction, a line break and its input.
  """
  texts = {turn.content.strip() for turn in turns}
  parts = {part for text in texts for part in text.split('\n', 1)}
  return texts | {part.strip() for part in parts}


def alpaca_prompt(fields: RowFields) -> list[Turn]:
  """The turns of an alpaca row up to and including its question."""
  turns = with_system(_history(fields), fields)
  question = check_text(fields.get('instruction'), "'instruction'")
  key, input_text = fields.get_alias(_INPUT_KEYS)
  if input_text is not None and not _is_blank(input_text):
    question += '\n' + check_text(input_text, repr(key))
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


def _prompt_and_completion(
  fields: RowFields, unused: UnusedFields | None
) -> list[Turn]:
  """TRL's prompt and completion, of which the completion is trained."""
  prompt = messages.parse_field(fields, 'prompt', 'user', unused)
  key, _ = fields.get_alias(_COMPLETION_KEYS)
  answer = messages.parse_field(fields, key, 'assistant', unused)
  return [
    dataclasses.replace(turn, trained=turn.role != 'assistant')
    for turn in prompt
  ] + answer


def _is_blank(value: Any) -> bool:
  return isinstance(value, str) and not value.strip()


def with_system(turns: list[Turn], fields: RowFields) -> list[Turn]:
  """Puts the system turn of a row's own field before its turns.

  Raises:
    BadRow: the field is not text, or the turns begin with another system turn.
  """
  key, system = fields.get_alias(_SYSTEM_KEYS)
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
  """Checks the order of turns: system, user, ...; tools after the assistant.

  Raises:
    BadRow: the order is another.
  """
  dialog = turns[1:] if turns and turns[0].role == 'system' else turns
  if not dialog or dialog[0].role != 'user':
    role = dialog[0].role if dialog else 'nobody'
    raise BadRow(
      f"a conversation begins with the user's turn, after the system's if "
      f'there is one; this one with the turn of {role}'
    )
  for i, (previous, turn) in enumerate(
    itertools.pairwise(dialog), len(turns) - len(dialog) + 1
  ):
    if turn.role == 'system':
      raise BadRow(f'turn {i} is of the system, which may only be the first')
    if turn.role == 'tool' and previous.role not in ('assistant', 'tool'):
      raise BadRow(
        f'turn {i} is of a tool and follows the {previous.role}, expected a '
        'call of the assistant before it'
      )
    if turn.role == 'tool' and not (
      previous.role == 'tool' or _may_call(previous)
    ):
      raise BadRow(
        f'turn {i} is of a tool, but the assistant called none before it; give '
        "its call in 'tool_calls' or a turn of 'function_call', or remove the "
        'row'
      )


def _may_call(turn: Turn) -> bool:
  """Whether a turn calls a tool, or may do so by JSON in its text."""
  return bool(turn.calls) or '{' in turn.content or '[' in turn.content
