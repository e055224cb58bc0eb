# SPDX-License-Identifier: Apache-2.0
"""The chat template that config.data names, as one Jinja text."""

import json

from moepeft.data import files
from moepeft.data.vocabulary import Tokenizer, Vocabulary


def read(path: str) -> str:
  """The text of config.data.chat_template, '' where there is none.

  Raises:
    ValueError: it cannot be read.
  """
  if not path:
    return ''
  return files.text('config.data.chat_template', path, 'a Jinja file')


def put(words: Vocabulary, path: str, system: str) -> None:
  """Makes the template that a run was trained by the tokenizer's own.

  Args:
    path, system: config.data.chat_template and config.data.system.

  Raises:
    ValueError: it cannot be read.
  """
  if isinstance(words, Tokenizer):
    text = read(path) or words.tokenizer.chat_template
    if isinstance(text, str):
      words.tokenizer.chat_template = with_system(text, system)


def with_system(text: str, system: str) -> str:
  """A template that puts a system's turn before conversations without one."""
  if not text or not system:
    return text
  said = json.dumps(system, ensure_ascii=False)
  turn = f"[{{'role': 'system', 'content': {said}}}]"
  return (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    f'{{%- set messages = {turn} + messages -%}}'
    # The line's end is the block's: what stands first is as it was.
    '{%- endif %}\n' + text
  )
