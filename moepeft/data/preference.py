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
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.data.rows import BadRow

FORMS = ('alpaca', 'sharegpt', 'messages')
_ROLES = {
  'system': 'system',
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'function_call': 'assistant',
  'observation': 'tool',
  'tool': 'tool',
}
# What each form's rows have of the first, and then of these.
_MARKS = {'conversations': 'sharegpt', 'instruction': 'alpaca'}
_LABELS = ('label', 'kto_tag')


@dataclasses.dataclass(frozen=True)
class Turn:
  """Who says what: 'system', 'user', 'assistant' or 'tool'."""

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Compared:
  """Two answers to one prompt, the first the better one.

  Attributes:
    prompt: turns, the last one not the model's.
    idx: by which rows are held out: those of one prompt together.
  """

  prompt: tuple[Turn, ...]
  chosen: str
  rejected: str
  idx: int = -1
  task: str = ''

  @property
  def answers(self) -> tuple[str, ...]:
    return self.chosen, self.rejected


@dataclasses.dataclass(frozen=True)
class Judged:
  """An answer to a prompt and whether it is a good one."""

  prompt: tuple[Turn, ...]
  answer: str
  label: bool
  idx: int = -1
  task: str = ''

  @property
  def answers(self) -> tuple[str, ...]:
    return (self.answer,)


def row(fields: Mapping[str, Any], form: str = '', idx: int = -1):
  """Looks at one row: a `Compared`, or a `Judged`.

  Args:
    form: of FORMS; '' finds out.

  Raises:
    BadRow: it is not of the form, or says nothing.
  """
  # A table has no absent fields: they are None there.
  fields = {k: v for k, v in fields.items() if v is not None}
  form = form or _form(fields)
  if form not in FORMS:
    raise ValueError(
      f'config.data.form is one of {", ".join(FORMS)}; got {form!r}'
    )
  prompt = _prompt(fields, form)
  if 'system' in fields and fields['system']:
    prompt = (Turn('system', _text(fields, 'system')), *prompt)
  if 'chosen' in fields or 'rejected' in fields:
    return _compared(fields, prompt, idx)
  return _judged(fields, prompt, form, idx)


def unpaired(pair: Compared) -> tuple[Judged, Judged]:
  """A comparison as a good and a bad answer."""
  return tuple(
    Judged(pair.prompt, answer, label, pair.idx, pair.task)
    for answer, label in ((pair.chosen, True), (pair.rejected, False))
  )


def _form(fields: Mapping[str, Any]) -> str:
  for key, form in _MARKS.items():
    if key in fields:
      return form
  if {'messages', 'prompt', 'chosen'} & set(fields):
    return 'messages'
  raise BadRow(
    "expected 'conversations', 'instruction', 'messages' or 'prompt'; got "
    f'{", ".join(sorted(fields)) or "no field"}'
  )


def _prompt(fields: Mapping[str, Any], form: str) -> tuple[Turn, ...]:
  """What a row gives before its answers; a judged row's last turn too."""
  if form == 'sharegpt':
    return _turns(fields, 'conversations')
  if form == 'alpaca':
    text = _text(fields, 'instruction')
    more = fields.get('input', '')
    if not isinstance(more, str):
      raise BadRow(f"expected text in 'input', got {more!r}")
    history = tuple(
      Turn(role, _filled(said, 'history'))
      for pair in fields.get('history', ())
      for role, said in zip(('user', 'assistant'), pair, strict=False)
    )
    return (*history, Turn('user', f'{text}\n{more}' if more else text))
  for key in ('messages', 'prompt'):
    if key in fields:
      return _turns(fields, key)
  # TRL's implicit prompt: the answers' lists begin with it.
  return ()


def _compared(fields, prompt: tuple[Turn, ...], idx: int) -> Compared:
  for key in ('chosen', 'rejected'):
    if key not in fields:
      raise BadRow(
        f"expected 'chosen' and 'rejected', but there is no {key!r}; mend or "
        'remove the row'
      )
  (before, chosen), (also, rejected) = (
    _answer(fields, key) for key in ('chosen', 'rejected')
  )
  if before != also:
    raise BadRow(
      'the chosen and the rejected conversation differ before their last turn, '
      'so no prompt is shared; mend or remove the row'
    )
  if before and before != prompt[-len(before) :]:
    prompt = before if prompt == before[-len(prompt) :] else prompt + before
  if chosen == rejected:
    raise BadRow(
      'the chosen and the rejected answer are the same, so nothing is '
      'compared; mend or remove the row'
    )
  return Compared(_asked(prompt), chosen, rejected, idx)


def _judged(fields, prompt: tuple[Turn, ...], form: str, idx: int) -> Judged:
  found = [key for key in _LABELS if key in fields]
  if not found:
    raise BadRow(
      "expected 'chosen' and 'rejected', or an answer with a 'label'; got "
      f'{", ".join(sorted(fields))}'
    )
  label = fields[found[0]]
  if not isinstance(label, bool):
    raise BadRow(
      f'expected true or false in {found[0]!r}, got {label!r}; mend or remove '
      'the row'
    )
  key = {'alpaca': 'output'}.get(form, 'completion')
  if form == 'alpaca' or key in fields:
    if key not in fields:
      raise BadRow(f'expected the answer in {key!r}; mend or remove the row')
    before, answer = _answer(fields, key)
    return Judged(_asked(prompt + before), answer, label, idx)
  if not prompt or prompt[-1].role != 'assistant':
    raise BadRow(
      "expected the model's answer as the last turn, which is judged; got "
      f'{prompt[-1].role if prompt else "no turn"!r}'
    )
  return Judged(_asked(prompt[:-1]), prompt[-1].content, label, idx)


def _answer(fields: Mapping[str, Any], key: str) -> tuple[tuple, str]:
  """(turns before it, an answer): a text, a turn, or a conversation."""
  value = fields[key]
  if isinstance(value, str):
    return (), _filled(value, key)
  turns = _turns(fields, key)
  if turns[-1].role != 'assistant':
    raise BadRow(
      f"expected the model's answer at the end of {key!r}; got a turn of "
      f'{turns[-1].role!r}'
    )
  return turns[:-1], turns[-1].content


def _asked(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
  if not prompt or prompt[-1].role not in ('user', 'tool'):
    raise BadRow(
      "expected a prompt whose last turn is the user's; got "
      f'{prompt[-1].role if prompt else "none"!r}; mend or remove the row'
    )
  return prompt


def _turns(fields: Mapping[str, Any], key: str) -> tuple[Turn, ...]:
  value = fields[key]
  if isinstance(value, str):
    return (Turn('user', _filled(value, key)),)
  if isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, Sequence) or not value:
    raise BadRow(
      f'expected text or a list of turns in {key!r}, got {value!r}; mend or '
      'remove the row'
    )
  return tuple(_turn(one, f'{key!r}, turn {i}') for i, one in enumerate(value))


def _turn(one: Any, where: str) -> Turn:
  if not isinstance(one, Mapping):
    raise BadRow(f'expected an object in {where}, got {one!r}')
  role = one.get('role', one.get('from'))
  if role not in _ROLES:
    raise BadRow(
      f'expected a role in {where}, one of {", ".join(_ROLES)}; got {role!r}'
    )
  return Turn(
    _ROLES[role], _filled(one.get('content', one.get('value')), where)
  )


def _text(fields: Mapping[str, Any], key: str) -> str:
  return _filled(fields[key], key) if key in fields else _filled(None, key)


def _filled(value: Any, where: str) -> str:
  if not isinstance(value, str) or not value.strip():
    where = where if where.startswith("'") else repr(where)
    raise BadRow(
      f'expected text in {where}, got {value!r}; mend or remove the row'
    )
  return value
