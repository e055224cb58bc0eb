# SPDX-License-Identifier: Apache-2.0
"""Reads chat templates, and makes them write the same text every day.

Some templates (Llama 3's) write today's date by `strftime_now`, so that a run
resumed on another day would train on other text. A run keeps the date of its
first start in config.data.date. Generating and serving use today's date.
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

_DATE_FUNCTION = 'strftime_now'
# A call with one string literal; a call with an expression does not match.
_DATE_CALL = re.compile(
  rf"""\b{_DATE_FUNCTION}\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\])*)\1\s*\)"""
)
_COMMENT = re.compile(r'\{#.*?#\}', re.S)
_DEFINED_TEST = re.compile(rf'\b{_DATE_FUNCTION}\s+is\s+(not\s+)?defined\b')
# Jinja's functions that use Python's global random generator.
_RANDOM_TAG = re.compile(
  r'\|\s*random\b|\bfilter\s+random\b|\bmap\s*\(\s*["\']random["\']'
  r'|\blipsum\b'
)
# The repr of a Python object, such as a method that is not called.
_OBJECT_ADDRESS = re.compile(r'<[^<>]* at 0x[0-9a-f]+>')


def read(path: str) -> str:
  """Reads the file config.data.chat_template; '' if there is none.

  Raises:
    ValueError: the file cannot be read.
  """
  if not path:
    return ''
  return fingerprint.read_named_text(
    'config.data.chat_template', path, 'a Jinja file'
  )


def template_source(tokenizer: Tokenizer, path: str) -> str:
  """The Jinja source of all templates of a config; '' if there is none."""
  template = (
    tokenizer.tokenizer.chat_template
    if isinstance(tokenizer, HuggingFaceTokenizer)
    else ''
  )
  source = read(path) or template or ''
  return source if isinstance(source, str) else '\n'.join(source.values())


def reads_clock(template: str) -> bool:
  """Whether a template writes the date."""
  return _DATE_FUNCTION in _DEFINED_TEST.sub('', _COMMENT.sub('', template))


def parse_date(text: str) -> datetime.datetime:
  """Parses config.data.date.

  Raises:
    ValueError: it is not a date.
  """
  try:
    return datetime.datetime.fromisoformat(text)
  except ValueError:
    raise ValueError(
      f"config.data.date is a date like '2024-07-26', or empty for today's; "
      f'got {text!r}'
    ) from None


def fix_date(template: str, date: str) -> str:
  """Replaces a template's calls for today's date by a fixed date.

  Args:
    date: config.data.date; '' leaves the template as it is.

  Raises:
    ValueError: it is not a date, or a call cannot be replaced.
  """
  if not date:
    return template
  parsed_date = parse_date(date)

  def replace(call: re.Match) -> str:
    literal = json.dumps(parsed_date.strftime(call[2]), ensure_ascii=False)
    # A call is an expression within {{ }}, so its replacement is one, too.
    return f'({literal})'

  fixed = _DATE_CALL.sub(replace, template)
  if reads_clock(fixed):
    raise ValueError(
      f'the chat template calls {_DATE_FUNCTION} with a format that is no text '
      'in quotes, so that its date cannot be kept for a run that goes on; name '
      'another template with config.data.chat_template'
    )
  return fixed


def with_date(config: ConfigDict, tokenizer: Tokenizer) -> ConfigDict:
  """Sets config.data.date to today, if it is empty and the template uses it.

  Args:
    config: a run's config.
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
    ValueError: the template uses random numbers, so that a resumed run would
      train on other text.
  """
  word = _RANDOM_TAG.search(_COMMENT.sub('', template))
  if word:
    raise ValueError(
      f'the chat template draws at random ({word[0]!r}), so that its text is '
      'another one each time; name another template with '
      'config.data.chat_template'
    )


def check_contents(text: str, contents: Iterable[str]) -> None:
  """
  Args:
    text: a rendered conversation.
    contents: the texts of the conversation.

  Raises:
    BadRow: the template wrote a memory address, which differs between
      processes.
  """
  address = _OBJECT_ADDRESS.search(text)
  if address and not any(address[0] in part for part in contents):
    raise BadRow(
      f'the chat template writes {address[0]!r} where a text should be, as '
      'of a method that it does not call; mend the template, or name another '
      'with config.data.chat_template'
    )


def set_chat_template(tokenizer: Tokenizer, path: str, system: str) -> None:
  """Sets a tokenizer's chat template to that of a run.

  Args:
    path, system: config.data.chat_template and config.data.system_prompt.

  Raises:
    ValueError: the template cannot be read.
  """
  if isinstance(tokenizer, HuggingFaceTokenizer):
    text = read(path) or tokenizer.tokenizer.chat_template
    if isinstance(text, str):
      tokenizer.tokenizer.chat_template = with_system(text, system)


def with_system(text: str, system: str) -> str:
  """Makes a template that adds a system turn to conversations without one."""
  if not text or not system:
    return text
  literal = json.dumps(system, ensure_ascii=False)
  turn = f"[{{'role': 'system', 'content': {literal}}}]"
  return (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    f'{{%- set messages = {turn} + messages -%}}'
    # Jinja drops the line break after a block.
    '{%- endif %}\n' + text
  )
