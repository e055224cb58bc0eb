# SPDX-License-Identifier: Apache-2.0
"""Refuses or lists the fields of rows and turns that no reader reads.

`RowFields` records the fields that a reader reads. A field that is not read is
an error if it changes the meaning of the row (`_MEANINGS`), since the model
would be trained on another row; all other fields are listed once per source.
The names are those of the exports of OpenAI, LLaMA-Factory, TRL, axolotl,
ms-swift and LLaVA, without case and punctuation: 'toolCalls' is 'tool_calls'.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

# Some exports leave it at the start of a text.
BYTE_ORDER_MARK = '\ufeff'
# Placeholders of images, audio and video in exports of multimodal data.
_MEDIA_PLACEHOLDER = re.compile(r'<\|?(?:image|audio|video)(?:_pad)?\|?>')
_MAX_UNUSED_NAMES = 1000


class BadRow(ValueError):
  """An error in one row, without its location, which the reader adds.

  The message is one printable line, whatever it quotes of the row.
  """

  def __init__(self, message: str):
    super().__init__(printable(message))


def printable(text: str) -> str:
  """Escapes control characters and lone surrogates."""
  if text.isprintable():
    return text
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def normalized_name(name: str) -> str:
  """A field's name without case and punctuation: 'toolcalls'."""
  return re.sub(r'[\W_]', '', name.lower())


class UnusedFields:
  """The fields of a source that nothing reads.

  Attributes:
    ignore: normalized names of fields that may be unused although they change
      the meaning of a row.
  """

  def __init__(self, ignore: str = ''):
    """
    Args:
      ignore: config.data.ignore_fields, names separated by commas.
    """
    names = (name for name in ignore.split(',') if name.strip())
    self.ignore = frozenset(map(normalized_name, names))
    self._names: dict[str, None] = {}
    self._media: dict[str, None] = {}

  def add_media(self, text: str) -> None:
    """Adds the placeholders of images, audio and video in a text."""
    if '<' in text:
      self._media |= dict.fromkeys(_MEDIA_PLACEHOLDER.findall(text))

  def add(self, name: str) -> None:
    if len(self._names) < _MAX_UNUSED_NAMES:
      self._names[name] = None

  def notes(self, path: str) -> list[str]:
    """Lines for the user that list unused fields and media placeholders."""
    lines = []
    if self._names:
      lines.append(
        f'{path}: fields that nothing reads: {join_names(self._names)}'
      )
    if self._media:
      lines.append(
        f'{path}: {join_names(self._media)} stands in its texts and is trained '
        'as text, as nothing but text is read'
      )
    return lines


def join_names(names: Iterable[str], max_names: int = 9) -> str:
  """'a, b and 5 more': the first names, and the number of the others."""
  names = list(names)
  joined = ', '.join(printable(name) or "''" for name in names[:max_names])
  extra = len(names) - max_names
  return f'{joined} and {extra} more' if extra > 0 else joined


# Fields that mark trained text. A value of _TRAINED is the default.
_LOSS = 'loss|train(?:able|ed|ing)?|learn(?:able|ed)?|supervised?|weight'
_LOSS_FIELD = re.compile(
  '(?:is|do|to|should|use|has|with|in|compute|calculate|assistant|completion|'
  f'token|turn|row|sample|example)*(?:{_LOSS}|masks?)(?:mask|scale|weight|detail|'
  'factor|flag|on|turn)*s?'
)
# Fields that exclude a turn from the loss, or include a prompt in it.
_NO_LOSS_FIELD = re.compile(
  f'(?:is|no|not|skip|ignore|exclude|from|in)*(?:{_LOSS}|ignored?|skip(?:ped)?|'
  f'excluded?|masked)|(?:{_LOSS}|mask)(?:on)?(?:prompt|input|history)s?'
)
# 'target' is a row's text; these mark a turn as one.
_TARGETS = 'is_target is_targets'
_TRAINED = (True, 1)
# The default of the request option 'tool_choice', which restricts nothing.
_DEFAULT_TOOL_CHOICE = 'auto'
_TEXTS = (
  'chosen completion completions content context contexts conversation '
  'conversations dialog dialogue document documents history input inputs '
  'instruction instructions messages negative_messages output passage passages '
  'positive_messages prompt query question rejected rejected_messages '
  'rejected_response response target targets text'
)
_TOOLS = (
  'available_tools function function_call function_calls functions observation '
  'tool tool_call_id tool_calls tool_choice tool_responses tool_results tools'
)
_THOUGHTS = re.compile(
  '(?:assistant|complex|long|short|model)?(?:chainofthought|cot|rationale|'
  'reasoning|scratchpad|think|thinking|thought)(?:chain|content|detail|process|'
  'step|text|trace)?s?'
)
_SYSTEM = (
  'developer developer_message developer_prompt sys_prompt system '
  'system_instruction system_instructions system_message system_prompt'
)
_SETTINGS = (
  'channel chat_template chat_template_kwargs enable_thinking model_identity '
  'prefill prefix reasoning_effort recipient refusal suffix template_kwargs '
  'thinking_budget'
)
_TRAINED_MARK = 'which marks what is trained'
_JUDGEMENT = 'kto_tag label margin'
_TOKENS = (
  'attention_mask input_ids label_ids labels position_ids target_ids '
  'token_type_ids'
)
# Meaningful in turns only; metadata in rows.
_SPEAKERS = 'from name role'
_VALUES = 'value'
# Normalized name -> its meaning, a clause of the message.
_MEANINGS = {
  normalized_name(name): description
  for names, description in (
    (_TARGETS, _TRAINED_MARK),
    (_TEXTS, 'which is text'),
    (_TOOLS, 'which is of tools'),
    (_SYSTEM, "which is text of the system's turn"),
    (_SETTINGS, 'which changes what a template writes'),
    (_JUDGEMENT, 'which says how good an answer is'),
    (_TOKENS, 'which is of token ids'),
    (_SPEAKERS, 'which says who speaks'),
    (_VALUES, 'which is text'),
  )
  for name in names.split()
}
_MEDIA = re.compile(
  '(?:input|output|user|assistant|prompt|question|answer|response|chosen|'
  'rejected|has)?(?:image|img|picture|photo|screenshot|pixelvalue|audio|sound|'
  'speech|video|media|multimodal|mm)s?'
  r'(?:path|url|uri|file|name|data|byte|base64|b64|list|input)?s?\d*'
)
_MEDIUM = 'which is no text and cannot be trained'
_TURN_FIELDS = frozenset(map(normalized_name, f'{_SPEAKERS} {_VALUES}'.split()))


class RowFields(Mapping):
  """A row or a turn that records the fields that are read.

  Fields that are null, the way of tables to leave a field out, or that
  config.data.ignore_fields names are absent.
  """

  def __init__(
    self,
    values: Mapping[str, Any],
    where: str = 'the row',
    unused: UnusedFields | None = None,
  ):
    """
    Args:
      where: 'the row' or 'turn 2', for messages.
      unused: collects the names of fields that are not read.
    """
    self._unused = unused if unused is not None else UnusedFields()
    self._values, self._names_read = {}, set()
    self._where = where
    for name, value in values.items():
      if normalized_name(name) in self._unused.ignore:
        self._list(name)
      elif value is not None:
        self._values[name] = value

  def __getitem__(self, name: str) -> Any:
    value = self._values[name]
    self._names_read.add(name)
    return value

  def __contains__(self, name: object) -> bool:
    return name in self._values

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def get_alias(self, names: Iterable[str]) -> tuple[str, Any]:
    """(name, value) of the first of several names of a field that has a value.

    Returns:
      ('', None) if none has.

    Raises:
      BadRow: two of the names have different values.
    """
    pairs = [(name, self[name]) for name in names if name in self]
    pairs = [(n, v) for n, v in pairs if v not in ('', [], {})] or pairs
    for name, value in pairs[1:]:
      if value != pairs[0][1]:
        raise BadRow(
          f'{self._where} has one value in {pairs[0][0]!r} and another in '
          f'{name!r}; remove one of them'
        )
    return pairs[0] if pairs else ('', None)

  def close(self, texts: Collection[str] = ()) -> None:
    """Refuses or lists the fields that were not read.

    Args:
      texts: the stripped texts that were read. A field that only repeats them
        is listed, not refused.

    Raises:
      BadRow: a field that changes the meaning of the row was not read.
    """
    is_row = self._where == 'the row'
    for name, value in self._values.items():
      if name in self._names_read:
        continue
      key, description = normalized_name(name), meaning(name)
      if key in _TURN_FIELDS and is_row:
        description = ''
      redundant = (
        not description
        or _is_default(name, value)
        or _repeats(value, texts)
        or is_row
        and _renders(name, value, texts)
      )
      if not redundant:
        raise BadRow(
          f'{self._where} has {name!r}, {description}, and nothing reads it '
          'here; give it in a field that is read, remove the row, or leave '
          f'the field unused with config.data.ignore_fields={name}'
        )
      self._list(name)

  def _list(self, name: str) -> None:
    suffix = '' if self._where == 'the row' else ' (of turns)'
    self._unused.add(name + suffix)


def meaning(name: str) -> str:
  """The meaning of a field that changes the row; '' for any other field."""
  key = normalized_name(name)
  if key in _MEANINGS:
    return _MEANINGS[key]
  patterns = (
    (_LOSS_FIELD, _TRAINED_MARK),
    (_NO_LOSS_FIELD, _TRAINED_MARK),
    (_THOUGHTS, 'which is a thought of the assistant'),
    (_MEDIA, _MEDIUM),
  )
  return next(
    (
      description for pattern, description in patterns if pattern.fullmatch(key)
    ),
    '',
  )


def _is_default(name: str, value: Any) -> bool:
  """Whether a row has the same meaning without a field of this value."""
  if _is_empty(value) or value in ('[]', '{}', 'null'):
    return True
  key = normalized_name(name)
  # It is unknown whether a mask of 1 means trained or masked.
  if key.startswith('mask') and key != 'masked':
    return False
  if meaning(name) == _TRAINED_MARK:
    trained = key in map(
      normalized_name, _TARGETS.split()
    ) or _LOSS_FIELD.fullmatch(key)
    return value in _TRAINED if trained and key != 'masked' else value is False
  if key in ('label', 'margin'):
    # KTO's labels are booleans; a text is the name of a class.
    return isinstance(value, str)
  if _MEDIA.fullmatch(key):
    return value is False
  return key in ('toolchoice', 'functioncall') and value == _DEFAULT_TOOL_CHOICE


def _is_empty(value: Any) -> bool:
  """Whether a value is empty, or a list or object of empty values."""
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, list):
    return all(map(_is_empty, value))
  return value in ('', None)


def _renders(name: str, value: Any, texts: Collection[str]) -> bool:
  """Whether a field is alpaca's 'text', the row rendered by a template."""
  lines = [line.strip() for text in texts for line in text.splitlines()]
  if name != 'text' or not isinstance(value, str) or not lines:
    return False
  return all(line in value for line in lines)


def _repeats(value: Any, texts: Collection[str]) -> bool:
  """Whether a value holds only texts of `texts`, as text, turn or list."""
  if isinstance(value, str):
    return value.strip() in texts
  if isinstance(value, Mapping):
    content = value.get('content', value.get('value'))
    return isinstance(content, str) and content.strip() in texts
  return isinstance(value, list) and all(_repeats(v, texts) for v in value)
