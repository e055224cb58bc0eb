# SPDX-License-Identifier: Apache-2.0
"""Fields of rows and of turns: used, refused, or listed as unused.

A reader takes a row's fields out of `Fields`, which knows afterwards which of
them nobody took. Those of `_MEANINGFUL` change what a row means, so that
training without them would be training on another row: they are refused. The
names are those of the exports of OpenAI, LLaMA-Factory, TRL, axolotl, ms-swift
and LLaVA, compared without case and punctuation ('toolCalls' is 'tool_calls').
Any other field is listed once for a source.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

# A byte order mark, which some exports leave at a text's beginning.
BYTE_ORDER_MARK = '\ufeff'
# What exports of multimodal data have in the place of a medium.
_PLACEHOLDER = re.compile(r'<\|?(?:image|audio|video)(?:_pad)?\|?>')
# Names that a source's list of unused fields holds.
_MOST_NAMES = 1000


class BadRow(ValueError):
  """A fault of one row; a reader adds where the row stands.

  The message is one line that can be printed, whatever it quotes of the row.
  """

  def __init__(self, message: str):
    super().__init__(printable(message))


def printable(text: str) -> str:
  """A text with control characters and halves of surrogate pairs escaped."""
  if text.isprintable():
    return text
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def normalized_name(name: str) -> str:
  """A field's name without case and punctuation: 'toolcalls'."""
  return re.sub(r'[\W_]', '', name.lower())


class UnusedFields:
  """The fields of a source that nothing reads.

  Attributes:
    ignore: keys of fields that may be left unused though they change what a
      row means; of config.data.ignore_fields.
  """

  def __init__(self, ignore: str = ''):
    """
    Args:
      ignore: names, separated by commas.
    """
    names = (name for name in ignore.split(',') if name.strip())
    self.ignore = frozenset(map(normalized_name, names))
    self._names: dict[str, None] = {}
    self._media: dict[str, None] = {}

  def see(self, text: str) -> None:
    """Looks for what stands for an image or a sound in a text."""
    if '<' in text:
      self._media |= dict.fromkeys(_PLACEHOLDER.findall(text))

  def add(self, name: str) -> None:
    if len(self._names) < _MOST_NAMES:
      self._names[name] = None

  def notes(self, path: str) -> list[str]:
    """A line that lists them; none where there are none."""
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


def join_names(names: Iterable[str], most: int = 9) -> str:
  """Names in a row, as many as a line holds."""
  names = list(names)
  shown = ', '.join(printable(name) or "''" for name in names[:most])
  return f'{shown} and {len(names) - most} more' * (len(names) > most) or shown


# Fields that say what is trained; with a value of _TRAINED they say nothing.
_ON = 'loss|train(?:able|ed|ing)?|learn(?:able|ed)?|supervised?|weight'
_OF_LOSS = re.compile(
  '(?:is|do|to|should|use|has|with|in|compute|calculate|assistant|completion|'
  f'token|turn|row|sample|example)*(?:{_ON}|masks?)(?:mask|scale|weight|detail|'
  'factor|flag|on|turn)*s?'
)
# What holds back a turn, or trains what is not an answer.
_OF_NO_LOSS = re.compile(
  f'(?:is|no|not|skip|ignore|exclude|from|in)*(?:{_ON}|ignored?|skip(?:ped)?|'
  f'excluded?|masked)|(?:{_ON}|mask)(?:on)?(?:prompt|input|history)s?'
)
# 'target' is a text of a row, and these say whether a turn is one.
_TARGETS = 'is_target is_targets'
_TRAINED = (True, 1)
# Of a request, not of a row; anything but this restricts the tools.
_FREE_CHOICE = 'auto'
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
_MARKS = 'which marks what is trained'
_JUDGEMENT = 'kto_tag label margin'
_TOKENS = (
  'attention_mask input_ids label_ids labels position_ids target_ids '
  'token_type_ids'
)
# Of turns alone: in a row these are metadata.
_SPEAKERS = 'from name role'
_VALUES = 'value'
# What one of the names below is, for the message.
_MEANINGFUL = {
  normalized_name(name): description
  for names, description in (
    (_TARGETS, _MARKS),
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
_OF_TURNS = frozenset(map(normalized_name, f'{_SPEAKERS} {_VALUES}'.split()))


class RowFields(Mapping):
  """A row or a turn, of which each field that is taken counts as used.

  A field that is null is absent, as tables have no other way to say so, and so
  is one that config.data.ignore_fields names.
  """

  def __init__(
    self,
    values: Mapping[str, Any],
    where: str = 'the row',
    unused: UnusedFields | None = None,
  ):
    """
    Args:
      where: named in errors; 'the row', or a turn of it.
      unused: told of the fields that nothing reads.
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
    """(name, value) of the one of several spellings that has a value.

    Returns:
      ('', None) where none has.

    Raises:
      BadRow: two of them have different values.
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
    """Refuses or lists the fields that nobody has taken.

    Args:
      texts: of the row, stripped: a field that only repeats some of them loses
        nothing.

    Raises:
      BadRow: a field that changes the meaning is left.
    """
    of_row = self._where == 'the row'
    for name, value in self._values.items():
      if name in self._names_read:
        continue
      key, description = normalized_name(name), meaning(name)
      if key in _OF_TURNS and of_row:
        description = ''
      needless = (
        not description
        or _says_nothing(name, value)
        or _repeats(value, texts)
        or of_row
        and _renders(name, value, texts)
      )
      if not needless:
        raise BadRow(
          f'{self._where} has {name!r}, {description}, and nothing reads it '
          'here; give it in a field that is read, remove the row, or leave '
          f'the field unused with config.data.ignore_fields={name}'
        )
      self._list(name)

  def _list(self, name: str) -> None:
    of_turns = '' if self._where == 'the row' else ' (of turns)'
    self._unused.add(name + of_turns)


def meaning(name: str) -> str:
  """The meaning of a field whose loss would change a row; '' of any other."""
  key = normalized_name(name)
  if key in _MEANINGFUL:
    return _MEANINGFUL[key]
  patterns = (
    (_OF_LOSS, _MARKS),
    (_OF_NO_LOSS, _MARKS),
    (_THOUGHTS, 'which is a thought of the assistant'),
    (_MEDIA, _MEDIUM),
  )
  return next(
    (description for form, description in patterns if form.fullmatch(key)), ''
  )


def _says_nothing(name: str, value: Any) -> bool:
  """Whether a row is the same without a field of this value."""
  if _is_empty(value) or value in ('[]', '{}', 'null'):
    return True
  key = normalized_name(name)
  # A mask of 1 may mark what is trained or what is not.
  if key.startswith('mask') and key != 'masked':
    return False
  if meaning(name) == _MARKS:
    trained = key in map(
      normalized_name, _TARGETS.split()
    ) or _OF_LOSS.fullmatch(key)
    return value in _TRAINED if trained and key != 'masked' else value is False
  if key in ('label', 'margin'):
    # KTO's; a category in words is metadata.
    return isinstance(value, str)
  if _MEDIA.fullmatch(key):
    return value is False
  return key in ('toolchoice', 'functioncall') and value == _FREE_CHOICE


def _is_empty(value: Any) -> bool:
  """Whether a value holds nothing, as lists and objects of nulls do."""
  if isinstance(value, Mapping):
    value = list(value.values())
  if isinstance(value, list):
    return all(map(_is_empty, value))
  return value in ('', None)


def _renders(name: str, value: Any, texts: Collection[str]) -> bool:
  """Whether a row's 'text' is all of the row again, in a template's words.

  It is alpaca's fourth column.
  """
  lines = [line.strip() for text in texts for line in text.splitlines()]
  if name != 'text' or not isinstance(value, str) or not lines:
    return False
  return all(line in value for line in lines)


def _repeats(value: Any, texts: Collection[str]) -> bool:
  """Whether a value is some of the texts, in whatever form."""
  if isinstance(value, str):
    return value.strip() in texts
  if isinstance(value, Mapping):
    content = value.get('content', value.get('value'))
    return isinstance(content, str) and content.strip() in texts
  return isinstance(value, list) and all(_repeats(v, texts) for v in value)
