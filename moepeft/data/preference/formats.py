# SPDX-License-Identifier: Apache-2.0
"""Rows of compared answers (chosen, rejected) and of judged ones (label).

A row's format is config.data.format, or follows from its keys:
- sharegpt: `conversations` of {from, value}; `chosen` and `rejected`, each a
  turn or text; or a last turn of the assistant and `kto_tag` (or `label`).
- messages: `prompt` (or `question`) and `chosen`, `rejected` as texts or lists
  of {role, content}, which may repeat the prompt's turns; `messages`, whose
  last turn is judged by `label`; `prompt`, `completion` and `label`.
- alpaca: `instruction`, `input`, and `chosen`, `rejected`, or `output` and
  `kto_tag`; optional `system` and `history`.
A prompt that a row gives in two fields is used once. If the fields differ and
their order is unknown, the row is refused. Turns are parsed as in
`moepeft.data.chat.formats`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.chat.messages import parse_field, parse_tools
from moepeft.data.row_fields import BadRow, RowFields, UnusedFields

_LABEL_KEYS = ('label', 'kto_tag')
_BOOLS = {'true': True, 'false': False}
_ANSWER_KEYS = {'chosen', 'rejected', 'completion'}
_PROMPT_KEYS = (
  'prompt',
  'question',
  'messages',
  'conversations',
  'instruction',
)


@dataclasses.dataclass(frozen=True)
class ComparedRow:
  """Two answers to one prompt: the chosen one is better.

  Attributes:
    prompt: a conversation whose last turn is not the assistant's.
    chosen, rejected: turns of the assistant.
    idx: index of the row in its file.
  """

  prompt: Conversation
  chosen: Turn
  rejected: Turn
  idx: int = -1

  @property
  def answers(self) -> tuple[Turn, ...]:
    return self.chosen, self.rejected


@dataclasses.dataclass(frozen=True)
class JudgedRow:
  """An answer to a prompt, and a label: whether the answer is good."""

  prompt: Conversation
  answer: Turn
  label: bool
  idx: int = -1

  @property
  def answers(self) -> tuple[Turn, ...]:
    return (self.answer,)


def parse_row(
  row: Mapping[str, Any],
  row_format: str = '',
  idx: int = -1,
  unused: UnusedFields | None = None,
) -> ComparedRow | JudgedRow:
  """Parses one row.

  Args:
    row_format: one of `chat.formats.FORMATS`; '' to infer it from the keys.
    unused: collects the names of fields that are not read.

  Raises:
    BadRow: the row is not in the format, its answers are equal, or a field
      that changes its meaning is not used.
    ValueError: there is no such format.
  """
  chat_formats.check_format(row_format)
  fields = RowFields(row, unused=unused)
  row_format = row_format or _infer_format(fields)
  if row_format == 'alpaca':
    turns = chat_formats.alpaca_prompt(fields)
  else:
    turns = _parse_turns(fields, row_format, unused)
  if 'chosen' in fields or 'rejected' in fields:
    prompt, chosen, rejected = _parse_pair(fields, turns, unused)
    parsed = ComparedRow(_make_prompt(fields, prompt), chosen, rejected, idx)
  else:
    prompt, answer, label = _parse_judged(fields, turns, row_format, unused)
    parsed = JudgedRow(_make_prompt(fields, prompt), answer, label, idx)
  _check_answers(parsed.prompt.turns[-1].content.strip(), parsed.answers)
  turns_read = (*parsed.prompt.turns, *parsed.answers)
  fields.close(chat_formats.turn_texts(turns_read))
  return parsed


def _check_answers(prompt: str, answers: Sequence[Turn]) -> None:
  """
  Raises:
    BadRow: an answer is marked as not trained, or both answers repeat the
      prompt. A prompt of one word may also be the first word of the answers.
  """
  if not all(turn.trained for turn in answers):
    raise BadRow(
      'an answer is marked as not trained, and answers are all that is trained '
      'here; remove the mark, or the row'
    )
  repeats = [turn.content.lstrip().startswith(prompt) for turn in answers]
  if len(answers) > 1 and all(repeats) and len(prompt.split()) > 1:
    raise BadRow(
      'both answers begin with the whole prompt, which would be there twice; '
      'leave it out of them'
    )


def split_pair(pair: ComparedRow) -> tuple[JudgedRow, JudgedRow]:
  """(the chosen answer as a good one, the rejected answer as a bad one)."""
  return (
    JudgedRow(pair.prompt, pair.chosen, True, pair.idx),
    JudgedRow(pair.prompt, pair.rejected, False, pair.idx),
  )


def mismatched_indices(rows: Sequence[JudgedRow], path: str) -> list[int]:
  """For each row, the index of a row with another prompt, the same each time.

  That row may be held out: mismatched answers are not trained.

  Raises:
    ValueError: all rows have one prompt.
  """
  count, indices = len(rows), []
  for i, row in enumerate(rows):
    candidates = ((i + count // 2 + step) % count for step in range(count))
    index = next((j for j in candidates if rows[j].prompt != row.prompt), None)
    if index is None:
      raise ValueError(
        f'all {count} rows of {path} have the same prompt, but kto measures '
        'answers against those to other prompts; add rows'
      )
    indices.append(index)
  return indices


def _infer_format(fields: RowFields) -> str:
  for key, row_format in (
    ('conversations', 'sharegpt'),
    ('instruction', 'alpaca'),
    ('messages', 'messages'),
    ('prompt', 'messages'),
    ('question', 'messages'),
    ('chosen', 'messages'),
    ('rejected', 'messages'),
  ):
    if key in fields:
      return row_format
  raise BadRow(
    "expected 'conversations', 'instruction', 'messages' or 'prompt'; got "
    f'{", ".join(sorted(fields)) or "no field"}; mend or remove the row'
  )


def _parse_turns(
  fields: RowFields, row_format: str, unused: UnusedFields | None
) -> list[Turn]:
  """The prompt's turns; a list of turns may end with the judged answer."""
  if row_format == 'sharegpt':
    key = 'conversations'
    if key not in fields:
      raise BadRow("expected a list of turns in 'conversations', got none")
  else:
    key = 'question' if 'prompt' not in fields else 'prompt'
    # Next to a prompt and answers, 'messages' may only repeat them.
    if 'messages' in fields and not (
      key in fields and _ANSWER_KEYS & set(fields)
    ):
      key = 'messages'
  # No key: TRL's implicit prompt, at the start of the answers' lists.
  turns = parse_field(fields, key, 'user', unused) if key in fields else []
  return chat_formats.with_system(turns, fields)


def _parse_pair(
  fields: RowFields, prompt: list[Turn], unused: UnusedFields | None
) -> tuple[list[Turn], Turn, Turn]:
  """(prompt, chosen, rejected)."""
  for key in ('chosen', 'rejected'):
    if key not in fields:
      raise BadRow(
        f"expected 'chosen' and 'rejected', but there is no {key!r}; mend or "
        'remove the row'
      )
  context, chosen = _parse_answer(fields, 'chosen', unused)
  rejected_context, rejected = _parse_answer(fields, 'rejected', unused)
  if context != rejected_context:
    raise BadRow(
      'the chosen and the rejected conversation differ before their last turn, '
      'so no prompt is shared; mend or remove the row'
    )
  if chosen == rejected:
    raise BadRow(
      'the chosen and the rejected answer are the same, so nothing is '
      'compared; mend or remove the row'
    )
  return _merge_prompts(prompt, context, chosen), chosen, rejected


def _merge_prompts(
  prompt: list[Turn], context: list[Turn], answer: Turn
) -> list[Turn]:
  """Merges the prompt's turns with the turns before the answer in its list.

  Raises:
    BadRow: both are there, neither contains the other, and their order is
      unknown.
  """
  if context and len(prompt) > 1 and prompt[-1] == answer:
    # The prompt's field is the whole conversation, with its answer.
    prompt = prompt[:-1]
  if not context or not prompt:
    return prompt or context
  a, b = list(map(_strip, prompt)), list(map(_strip, context))
  if a[-len(b) :] == b:
    return prompt
  if a in (b[-len(a) :], b[: len(a)]):
    return context
  continues = context[0].role != 'user' and prompt[-1].role in ('user', 'tool')
  if continues or [turn.role for turn in prompt] == ['system']:
    return prompt + context
  raise BadRow(
    'the prompt and the turns before the answers in their lists are different '
    'ones, and nothing tells which come first; leave one of them out'
  )


def _strip(turn: Turn) -> Turn:
  return dataclasses.replace(turn, content=turn.content.strip())


def _parse_judged(
  fields: RowFields,
  prompt: list[Turn],
  row_format: str,
  unused: UnusedFields | None,
) -> tuple[list[Turn], Turn, bool]:
  """(prompt, answer, label)."""
  name, label = fields.get_alias(_LABEL_KEYS)
  if not name:
    raise BadRow(
      "expected 'chosen' and 'rejected', or an answer with a 'label'; got "
      f'{", ".join(sorted(fields))}; mend or remove the row'
    )
  if isinstance(label, str):
    # CSV has no booleans.
    label = _BOOLS.get(label.strip().lower(), label)
  if not isinstance(label, bool):
    raise BadRow(
      f'expected true or false in {name!r}, got {label!r}; mend or remove '
      'the row'
    )
  key = 'output' if row_format == 'alpaca' else 'completion'
  if row_format == 'alpaca' or key in fields:
    if key not in fields:
      raise BadRow(f'expected the answer in {key!r}; mend or remove the row')
    context, answer = _parse_answer(fields, key, unused)
    return _merge_prompts(prompt, context, answer), answer, label
  if not prompt or prompt[-1].role != 'assistant':
    role = prompt[-1].role if prompt else 'nobody'
    raise BadRow(
      "expected the assistant's answer as the last turn, which is judged; got "
      f'that of {role}; mend or remove the row'
    )
  return prompt[:-1], prompt[-1], label


def _parse_answer(
  fields: RowFields, key: str, unused: UnusedFields | None
) -> tuple[list[Turn], Turn]:
  """(context, answer) of a field: a text, a turn, or a list of turns."""
  turns = parse_field(fields, key, 'assistant', unused)
  if not turns or turns[-1].role != 'assistant':
    role = turns[-1].role if turns else 'nobody'
    raise BadRow(
      f"expected the assistant's answer at the end of {key!r}; got the turn of "
      f'{role}; mend or remove the row'
    )
  return turns[:-1], turns[-1]


def _make_prompt(fields: RowFields, turns: list[Turn]) -> Conversation:
  """Makes a prompt of turns, the last of which must be a user's or a tool's."""
  if not turns:
    raise BadRow(
      'there is no prompt: expected one in '
      f'{", ".join(map(repr, _PROMPT_KEYS))}, or before the answers in their '
      'own lists; mend or remove the row'
    )
  if turns[-1].role not in ('user', 'tool'):
    raise BadRow(
      "expected a prompt whose last turn is the user's; got that of "
      f'{turns[-1].role}; mend or remove the row'
    )
  chat_formats.check_order(turns)
  return Conversation(tuple(turns), parse_tools(fields))
