# SPDX-License-Identifier: Apache-2.0
"""The chat template that config.data names, as one Jinja text.

Templates may ask for the date (Llama 3's do), by `strftime_now`, so that a run
that goes on another day would train on another text. A run keeps the date of
its first start in config.data.date; generating and serving use today's, as
these templates are meant.
"""

import datetime
import json
import re
from collections.abc import Iterable

from ml_collections import ConfigDict

from moepeft.data import fingerprint
from moepeft.data.readers import READERS
from moepeft.data.row_fields import BadRow
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer

_CLOCK = 'strftime_now'
# One text in quotes, so that nothing of an expression is taken for a format.
_CALL = re.compile(
  rf"""\b{_CLOCK}\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\])*)\1\s*\)"""
)
_COMMENT = re.compile(r'\{#.*?#\}', re.S)
_DEFINED_TEST = re.compile(rf'\b{_CLOCK}\s+is\s+(not\s+)?defined\b')
# Jinja's words that draw from Python's own generator, which no seed of ours
# sets.
_RANDOM = re.compile(
  r'\|\s*random\b|\bfilter\s+random\b|\bmap\s*\(\s*["\']random["\']'
  r'|\blipsum\b'
)
# How Python writes a value that has no text, such as a method not called.
_ADDRESS = re.compile(r'<[^<>]* at 0x[0-9a-f]+>')


def read(path: str) -> str:
  """The text of config.data.chat_template, '' where there is none.

  Raises:
    ValueError: it cannot be read.
  """
  if not path:
    return ''
  return fingerprint.read_named_text(
    'config.data.chat_template', path, 'a Jinja file'
  )


def template_source(tokenizer: Tokenizer, path: str) -> str:
  """All that the template of a config may say; '' where there is none."""
  template = (
    tokenizer.tokenizer.chat_template
    if isinstance(tokenizer, HuggingFaceTokenizer)
    else ''
  )
  source = read(path) or template or ''
  return source if isinstance(source, str) else '\n'.join(source.values())


def reads_clock(template: str) -> bool:
  """Whether a template writes the date."""
  return _CLOCK in _DEFINED_TEST.sub('', _COMMENT.sub('', template))


def parse_date(text: str) -> datetime.datetime:
  """config.data.date as a date.

  Raises:
    ValueError: it is none.
  """
  try:
    return datetime.datetime.fromisoformat(text)
  except ValueError:
    raise ValueError(
      f"config.data.date is a date like '2024-07-26', or empty for today's; "
      f'got {text!r}'
    ) from None


def fix_date(template: str, date: str) -> str:
  """A template that writes a date wherever it asked for the day's.

  Args:
    date: config.data.date; '' leaves the template as it is.

  Raises:
    ValueError: it is no date, or the template asks in a way that cannot be
      replaced.
  """
  if not date:
    return template
  when = parse_date(date)

  def written(call: re.Match) -> str:
    literal = json.dumps(when.strftime(call[2]), ensure_ascii=False)
    # A call may stand within {{ }}, so its text is an expression too.
    return f'({literal})'

  fixed = _CALL.sub(written, template)
  if reads_clock(fixed):
    raise ValueError(
      f'the chat template calls {_CLOCK} with a format that is no text in '
      'quotes, so that its date cannot be kept for a run that goes on; name '
      'another template with config.data.chat_template'
    )
  return fixed


def with_date(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
  """A config whose chat template writes the same date whenever it is read.

  Args:
    config: of a run; where config.data.date is empty and the template asks
      for the date, it becomes today's.
  """
  data = config.data
  if data.date or not READERS.lookup(data.source).uses_chat_template:
    return config
  if not reads_clock(template_source(tokenizer, data.chat_template)):
    return config
  config = config.copy_and_resolve_references()
  config.data.date = datetime.date.today().isoformat()
  return config


def check_deterministic(template: str) -> None:
  """
  Raises:
    ValueError: the template draws at random, so that a run that goes on would
      train on another text.
  """
  word = _RANDOM.search(_COMMENT.sub('', template))
  if word:
    raise ValueError(
      f'the chat template draws at random ({word[0]!r}), so that its text is '
      'another one each time; name another template with '
      'config.data.chat_template'
    )


def check_contents(text: str, contents: Iterable[str]) -> None:
  """
  Args:
    text: what a template wrote of a conversation.
    contents: the texts of the conversation.

  Raises:
    BadRow: the template wrote an address, which is another one in each process.
  """
  address = _ADDRESS.search(text)
  if address and not any(address[0] in part for part in contents):
    raise BadRow(
      f'the chat template writes {address[0]!r} where a text should be, as '
      'of a method that it does not call; mend the template, or name another '
      'with config.data.chat_template'
    )


def set_chat_template(tokenizer: Tokenizer, path: str, system: str) -> None:
  """Makes the template that a run was trained by the tokenizer's own.

  Args:
    path, system: config.data.chat_template and config.data.system_prompt.

  Raises:
    ValueError: it cannot be read.
  """
  if isinstance(tokenizer, HuggingFaceTokenizer):
    text = read(path) or tokenizer.tokenizer.chat_template
    if isinstance(text, str):
      tokenizer.tokenizer.chat_template = with_system(text, system)


def with_system(text: str, system: str) -> str:
  """A template that puts a system's turn before conversations without one."""
  if not text or not system:
    return text
  literal = json.dumps(system, ensure_ascii=False)
  turn = f"[{{'role': 'system', 'content': {literal}}}]"
  return (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    f'{{%- set messages = {turn} + messages -%}}'
    # The line's end is the block's: what stands first is as it was.
    '{%- endif %}\n' + text
  )
