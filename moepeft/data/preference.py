# SPDX-License-Identifier: Apache-2.0
"""Rows of compared answers (chosen, rejected) and of judged ones (label).

The forms, told by their keys (config.data.form names one instead):
- sharegpt: `conversations` of {from, value}; `chosen` and `rejected`, each a
  turn or text; or a last turn of the model's and `kto_tag` (or `label`).
- messages: `prompt` and `chosen`, `rejected` as texts or lists of {role,
  content}, the prompt's turns in the answers' lists or not; `messages` of
  which the last is judged by `label`; `prompt`, `completion` and `label`.
- alpaca: `instruction`, `input`, and `chosen`, `rejected`, or `output` and
  `kto_tag`; `system` and `history` where there are any.
Turns are those of `moepeft.data.conversations`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.data import conversations
from moepeft.data import turns as turns_lib
from moepeft.data.conversations import FORMS, Conversation, Turn
from moepeft.data.rows import BadRow

_LABELS = ('label', 'kto_tag')
_PROMPTS = ('prompt', 'messages', 'conversations', 'instruction')


@dataclasses.dataclass(frozen=True)
class Compared:
  """Two answers to one prompt, the first the better one.

  Attributes:
    prompt: its last turn is not the model's.
    chosen, rejected: turns of the model's.
    idx: of the row in its file.
  """

  prompt: Conversation
  chosen: Turn
  rejected: Turn
  idx: int = -1

  @property
  def answers(self) -> tuple[Turn, ...]:
    return self.chosen, self.rejected


@dataclasses.dataclass(frozen=True)
class Judged:
  """An answer to a prompt and whether it is a good one."""

  prompt: Conversation
  answer: Turn
  label: bool
  idx: int = -1

  @property
  def answers(self) -> tuple[Turn, ...]:
    return (self.answer,)


def row(
  fields: Mapping[str, Any], form: str = '', idx: int = -1
) -> Compared | Judged:
  """Looks at one row.

  Args:
    form: of FORMS; '' finds out.

  Raises:
    BadRow: it is not of the form, or says nothing.
    ValueError: there is no such form.
  """
  # A table has no absent fields: they are None there.
  fields = {k: v for k, v in fields.items() if v is not None}
  if form and form not in FORMS:
    raise ValueError(
      f'config.data.form is one of {", ".join(FORMS)}, or empty to find out; '
      f'got {form!r}'
    )
  form = form or _form(fields)
  turns = _alpaca(fields) if form == 'alpaca' else _before(fields, form)
  if 'chosen' in fields or 'rejected' in fields:
    prompt, chosen, rejected = _compared(fields, turns)
    return Compared(_asked(fields, prompt), chosen, rejected, idx)
  prompt, answer, label = _judged(fields, turns, form)
  return Judged(_asked(fields, prompt), answer, label, idx)


def unpaired(pair: Compared) -> tuple[Judged, Judged]:
  """A comparison as a good and a bad answer."""
  return (
    Judged(pair.prompt, pair.chosen, True, pair.idx),
    Judged(pair.prompt, pair.rejected, False, pair.idx),
  )


def mismatched(rows: Sequence[Judged], path: str) -> list[int]:
  """For each row the place of one with another prompt, always the same one.

  It may be a row that is held out: nothing is learnt of a mismatched answer.

  Raises:
    ValueError: all rows have one prompt.
  """
  count, found = len(rows), []
  for i, row in enumerate(rows):
    places = ((i + count // 2 + step) % count for step in range(count))
    other = next((j for j in places if rows[j].prompt != row.prompt), None)
    if other is None:
      raise ValueError(
        f'all {count} rows of {path} have the same prompt, but kto measures '
        'answers against those to other prompts; add rows'
      )
    found.append(other)
  return found


def _form(fields: Mapping[str, Any]) -> str:
  for key, form in (
    ('conversations', 'sharegpt'),
    ('instruction', 'alpaca'),
    ('messages', 'messages'),
    ('prompt', 'messages'),
    ('chosen', 'messages'),
    ('rejected', 'messages'),
  ):
    if key in fields:
      return form
  raise BadRow(
    "expected 'conversations', 'instruction', 'messages' or 'prompt'; got "
    f'{", ".join(sorted(fields)) or "no field"}; mend or remove the row'
  )


def _alpaca(fields: Mapping[str, Any]) -> list[Turn]:
  # Its own answer, which is judged or not there, is not looked at here.
  whole = conversations.conversation({**fields, 'output': '-'}, 'alpaca')
  return list(whole.turns[:-1])


def _before(fields: Mapping[str, Any], form: str) -> list[Turn]:
  """What a row gives before its answers; a judged row's last turn too."""
  keys = ('conversations',) if form == 'sharegpt' else ('messages', 'prompt')
  key = next((key for key in keys if key in fields), '')
  if not key and form == 'sharegpt':
    raise BadRow("expected a list of turns in 'conversations', got none")
  # TRL's implicit prompt: the answers' lists begin with it.
  turns = _turns(fields, key, 'user') if key else []
  return conversations.with_system(turns, fields.get('system'))


def _compared(
  fields: Mapping[str, Any], prompt: list[Turn]
) -> tuple[list[Turn], Turn, Turn]:
  """(prompt, chosen, rejected)."""
  for key in ('chosen', 'rejected'):
    if key not in fields:
      raise BadRow(
        f"expected 'chosen' and 'rejected', but there is no {key!r}; mend or "
        'remove the row'
      )
  before, chosen = _answer(fields, 'chosen')
  also, rejected = _answer(fields, 'rejected')
  if before != also:
    raise BadRow(
      'the chosen and the rejected conversation differ before their last turn, '
      'so no prompt is shared; mend or remove the row'
    )
  # The answers' lists may hold the prompt once more.
  if prompt[len(prompt) - len(before) :] != before:
    repeated = before[len(before) - len(prompt) :] == prompt
    prompt = before if repeated else prompt + before
  if chosen == rejected:
    raise BadRow(
      'the chosen and the rejected answer are the same, so nothing is '
      'compared; mend or remove the row'
    )
  return prompt, chosen, rejected


def _judged(
  fields: Mapping[str, Any], prompt: list[Turn], form: str
) -> tuple[list[Turn], Turn, bool]:
  """(prompt, answer, label)."""
  found = [key for key in _LABELS if key in fields]
  if not found:
    raise BadRow(
      "expected 'chosen' and 'rejected', or an answer with a 'label'; got "
      f'{", ".join(sorted(fields))}; mend or remove the row'
    )
  label = fields[found[0]]
  if not isinstance(label, bool):
    raise BadRow(
      f'expected true or false in {found[0]!r}, got {label!r}; mend or remove '
      'the row'
    )
  key = 'output' if form == 'alpaca' else 'completion'
  if form == 'alpaca' or key in fields:
    if key not in fields:
      raise BadRow(f'expected the answer in {key!r}; mend or remove the row')
    before, answer = _answer(fields, key)
    return prompt + before, answer, label
  if not prompt or prompt[-1].role != 'assistant':
    who = prompt[-1].role if prompt else 'nobody'
    raise BadRow(
      "expected the assistant's answer as the last turn, which is judged; got "
      f'that of {who}; mend or remove the row'
    )
  return prompt[:-1], prompt[-1], label


def _answer(fields: Mapping[str, Any], key: str) -> tuple[list[Turn], Turn]:
  """(turns before it, an answer): a text, a turn, or a conversation."""
  *before, answer = _turns(fields, key, 'assistant')
  if answer.role != 'assistant':
    raise BadRow(
      f"expected the assistant's answer at the end of {key!r}; got the turn of "
      f'{answer.role}; mend or remove the row'
    )
  return before, answer


def _turns(fields: Mapping[str, Any], key: str, role: str) -> list[Turn]:
  """A field's turns: a text is one of `role`, an object one of its own."""
  value = fields[key]
  if isinstance(value, str):
    return [_turn(value, role, repr(key))]
  if isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, list) or not value:
    raise BadRow(
      f'expected text or a list of turns in {key!r}, got {value!r}; mend or '
      'remove the row'
    )
  try:
    return [turns_lib.turn(item, i) for i, item in enumerate(value)]
  except BadRow as e:
    raise BadRow(f'{key!r}, {e}') from None


def _turn(value: Any, role: str, where: str) -> Turn:
  if not isinstance(value, str):
    raise BadRow(
      f'expected text in {where}, got {value!r}; mend or remove the row'
    )
  if not value.strip():
    raise BadRow(f'{where} is empty; fill it in, or remove the row')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise BadRow(
      f'{where} holds half of a character; mend or remove the row'
    ) from None
  return Turn(role, value)


def _asked(fields: Mapping[str, Any], turns: list[Turn]) -> Conversation:
  """A prompt, which ends with a turn that asks for an answer."""
  if not turns:
    raise BadRow(
      'there is no prompt: expected one in '
      f'{", ".join(map(repr, _PROMPTS))}, or before the answers in their own '
      'lists; mend or remove the row'
    )
  if turns[-1].role not in ('user', 'tool'):
    raise BadRow(
      "expected a prompt whose last turn is the user's; got that of "
      f'{turns[-1].role}; mend or remove the row'
    )
  conversations.check_order(turns)
  return Conversation(tuple(turns), turns_lib.tools(fields.get('tools')))
