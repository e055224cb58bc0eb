# SPDX-License-Identifier: Apache-2.0
"""Rows of compared answers (chosen, rejected) and of judged ones (label).

The forms, told by their keys (config.data.format names one instead):
- sharegpt: `conversations` of {from, value}; `chosen` and `rejected`, each a
  turn or text; or a last turn of the model's and `kto_tag` (or `label`).
- messages: `prompt` (or `question`) and `chosen`, `rejected` as texts or lists
  of {role, content}, the prompt's turns in the answers' lists or not;
  `messages` of which the last is judged by `label`; `prompt`, `completion` and
  `label`.
- alpaca: `instruction`, `input`, and `chosen`, `rejected`, or `output` and
  `kto_tag`; `system` and `history` where there are any.
A prompt that the row gives in two places is there once; where the places
differ and nothing tells their order, the row is refused. Turns are those of
`moepeft.data.chat.formats`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.chat.messages import parse_field, parse_tools
from moepeft.data.row_fields import BadRow, RowFields, UnusedFields

_LABELS = ('label', 'kto_tag')
_TRUTHS = {'true': True, 'false': False}
_ANSWERS = {'chosen', 'rejected', 'completion'}
_PROMPTS = ('prompt', 'question', 'messages', 'conversations', 'instruction')


@dataclasses.dataclass(frozen=True)
class ComparedRow:
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
class JudgedRow:
  """An answer to a prompt and whether it is a good one."""

  prompt: Conversation
  answer: Turn
  label: bool
  idx: int = -1

  @property
  def answers(self) -> tuple[Turn, ...]:
    return (self.answer,)


def parse_row(
  row: Mapping[str, Any],
  form: str = '',
  idx: int = -1,
  unused: UnusedFields | None = None,
) -> ComparedRow | JudgedRow:
  """Looks at one row.

  Args:
    form: of FORMS; '' finds out.
    unused: told of the fields that are not read.

  Raises:
    BadRow: it is not of the form, says nothing, or has a field that changes
      its meaning and cannot be used.
    ValueError: there is no such form.
  """
  chat_formats.check_form(form)
  # A table has no absent fields: they are None there.
  fields = RowFields(row, unused=unused)
  form = form or _form(fields)
  if form == 'alpaca':
    turns = chat_formats.alpaca_prompt(fields)
  else:
    turns = _before(fields, form, unused)
  if 'chosen' in fields or 'rejected' in fields:
    prompt, chosen, rejected = _compared(fields, turns, unused)
    parsed = ComparedRow(_prompt(fields, prompt), chosen, rejected, idx)
  else:
    prompt, answer, label = _judged(fields, turns, form, unused)
    parsed = JudgedRow(_prompt(fields, prompt), answer, label, idx)
  _check_answers(parsed.prompt.turns[-1].content.strip(), parsed.answers)
  turns_read = (*parsed.prompt.turns, *parsed.answers)
  fields.close(chat_formats.turn_texts(turns_read))
  return parsed


def _check_answers(prompt: str, answers: Sequence[Turn]) -> None:
  """
  Raises:
    BadRow: an answer is marked as not trained, or both begin with what was
      prompt: they are whole texts, prompt and all. One word may be an answer's.
  """
  if not all(turn.trained for turn in answers):
    raise BadRow(
      'an answer is marked as not trained, and answers are all that is trained '
      'here; remove the mark, or the row'
    )
  begun = [turn.content.lstrip().startswith(prompt) for turn in answers]
  if len(answers) > 1 and all(begun) and len(prompt.split()) > 1:
    raise BadRow(
      'both answers begin with the whole prompt, which would be there twice; '
      'leave it out of them'
    )


def unpaired(pair: ComparedRow) -> tuple[JudgedRow, JudgedRow]:
  """A comparison as a good and a bad answer."""
  return (
    JudgedRow(pair.prompt, pair.chosen, True, pair.idx),
    JudgedRow(pair.prompt, pair.rejected, False, pair.idx),
  )


def mismatched(rows: Sequence[JudgedRow], path: str) -> list[int]:
  """For each row the place of one with another prompt, always the same one.

  It may be a row that is held out: nothing is learnt of a mismatched answer.

  Raises:
    ValueError: all rows have one prompt.
  """
  count, chosen = len(rows), []
  for i, row in enumerate(rows):
    places = ((i + count // 2 + step) % count for step in range(count))
    candidate = next((j for j in places if rows[j].prompt != row.prompt), None)
    if candidate is None:
      raise ValueError(
        f'all {count} rows of {path} have the same prompt, but kto measures '
        'answers against those to other prompts; add rows'
      )
    chosen.append(candidate)
  return chosen


def _form(fields: RowFields) -> str:
  for key, form in (
    ('conversations', 'sharegpt'),
    ('instruction', 'alpaca'),
    ('messages', 'messages'),
    ('prompt', 'messages'),
    ('question', 'messages'),
    ('chosen', 'messages'),
    ('rejected', 'messages'),
  ):
    if key in fields:
      return form
  raise BadRow(
    "expected 'conversations', 'instruction', 'messages' or 'prompt'; got "
    f'{", ".join(sorted(fields)) or "no field"}; mend or remove the row'
  )


def _before(
  fields: RowFields, form: str, unused: UnusedFields | None
) -> list[Turn]:
  """The turns before a row's answers; a judged row's answer too."""
  if form == 'sharegpt':
    key = 'conversations'
    if key not in fields:
      raise BadRow("expected a list of turns in 'conversations', got none")
  else:
    key = 'question' if 'prompt' not in fields else 'prompt'
    # 'messages' beside it may only repeat what else the row says.
    if 'messages' in fields and not (key in fields and _ANSWERS & set(fields)):
      key = 'messages'
  # TRL's implicit prompt: the answers' lists begin with it.
  turns = parse_field(fields, key, 'user', unused) if key in fields else []
  return chat_formats.with_system(turns, fields)


def _compared(
  fields: RowFields, prompt: list[Turn], unused: UnusedFields | None
) -> tuple[list[Turn], Turn, Turn]:
  """(prompt, chosen, rejected)."""
  for key in ('chosen', 'rejected'):
    if key not in fields:
      raise BadRow(
        f"expected 'chosen' and 'rejected', but there is no {key!r}; mend or "
        'remove the row'
      )
  first_turns, chosen = _answer(fields, 'chosen', unused)
  also, rejected = _answer(fields, 'rejected', unused)
  if first_turns != also:
    raise BadRow(
      'the chosen and the rejected conversation differ before their last turn, '
      'so no prompt is shared; mend or remove the row'
    )
  if chosen == rejected:
    raise BadRow(
      'the chosen and the rejected answer are the same, so nothing is '
      'compared; mend or remove the row'
    )
  return _joined(prompt, first_turns, chosen), chosen, rejected


def _joined(
  prompt: list[Turn], first_turns: list[Turn], chosen: Turn
) -> list[Turn]:
  """The prompt once, of what a row gives as such and what its answers' lists
  begin with.

  Raises:
    BadRow: the two are different turns of a user's, in an order that nothing
      tells.
  """
  if first_turns and len(prompt) > 1 and prompt[-1] == chosen:
    # The whole conversation with its chosen answer.
    prompt = prompt[:-1]
  if not first_turns or not prompt:
    return prompt or first_turns
  prompt_texts, begun = (
    list(map(_stripped, prompt)),
    list(map(_stripped, first_turns)),
  )
  if prompt_texts[-len(begun) :] == begun:
    return prompt
  if prompt_texts in (begun[-len(prompt_texts) :], begun[: len(prompt_texts)]):
    return first_turns
  goes_on = first_turns[0].role != 'user' and prompt[-1].role in (
    'user',
    'tool',
  )
  if goes_on or [turn.role for turn in prompt] == ['system']:
    return prompt + first_turns
  raise BadRow(
    'the prompt and the turns before the answers in their lists are different '
    'ones, and nothing tells which come first; leave one of them out'
  )


def _stripped(turn: Turn) -> Turn:
  return dataclasses.replace(turn, content=turn.content.strip())


def _judged(
  fields: RowFields, prompt: list[Turn], form: str, unused: UnusedFields | None
) -> tuple[list[Turn], Turn, bool]:
  """(prompt, answer, label)."""
  name, label = fields.get_alias(_LABELS)
  if not name:
    raise BadRow(
      "expected 'chosen' and 'rejected', or an answer with a 'label'; got "
      f'{", ".join(sorted(fields))}; mend or remove the row'
    )
  if isinstance(label, str):
    # Tables of text have no other way to write it.
    label = _TRUTHS.get(label.strip().lower(), label)
  if not isinstance(label, bool):
    raise BadRow(
      f'expected true or false in {name!r}, got {label!r}; mend or remove '
      'the row'
    )
  key = 'output' if form == 'alpaca' else 'completion'
  if form == 'alpaca' or key in fields:
    if key not in fields:
      raise BadRow(f'expected the answer in {key!r}; mend or remove the row')
    first_turns, answer = _answer(fields, key, unused)
    return _joined(prompt, first_turns, answer), answer, label
  if not prompt or prompt[-1].role != 'assistant':
    who = prompt[-1].role if prompt else 'nobody'
    raise BadRow(
      "expected the assistant's answer as the last turn, which is judged; got "
      f'that of {who}; mend or remove the row'
    )
  return prompt[:-1], prompt[-1], label


def _answer(
  fields: RowFields, key: str, unused: UnusedFields | None
) -> tuple[list[Turn], Turn]:
  """(turns before it, an answer): a text, a turn, or a conversation."""
  turns = parse_field(fields, key, 'assistant', unused)
  if not turns or turns[-1].role != 'assistant':
    who = turns[-1].role if turns else 'nobody'
    raise BadRow(
      f"expected the assistant's answer at the end of {key!r}; got the turn of "
      f'{who}; mend or remove the row'
    )
  return turns[:-1], turns[-1]


def _prompt(fields: RowFields, turns: list[Turn]) -> Conversation:
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
  chat_formats.check_order(turns)
  return Conversation(tuple(turns), parse_tools(fields))
