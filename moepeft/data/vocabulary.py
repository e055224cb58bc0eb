# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: bytes, or a model's own tokenizer."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class Vocabulary(Protocol):
  """Ids 0 and 1 are padding and end of sequence, as in T5."""

  size: int
  eos: int

  def encode(self, text: str) -> list[int]: ...

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]: ...

  def decode(self, ids: list[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes plus 3, as in ByT5 (arXiv:2105.13626): no files needed."""

  size: int = 259
  eos: int = 1

  def encode(self, text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
    ids = (np.frombuffer(text.encode(), np.uint8) for text in texts)
    return [row.astype(np.int32) + 3 for row in ids]

  def __str__(self) -> str:
    return 'bytes'

  def decode(self, ids: list[int]) -> str:
    """Ids below 3 or above 258 are dropped; broken UTF-8 is marked."""
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors='replace')


class Tokenizer:
  """A Hugging Face tokenizer; special tokens are ours to add."""

  def __init__(self, path: str):
    # Imported here: it costs seconds, and the default run needs none of it.
    from transformers import AutoTokenizer

    try:
      self._tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
      reason = str(e).splitlines()[0]
      raise ValueError(
        f'no tokenizer could be read from {path!r} ({reason}); set '
        'config.data.vocabulary to a directory that holds tokenizer.json, or '
        "to 'bytes'"
      ) from None
    self._path = path
    self.size = len(self._tokenizer)
    self.eos = self._tokenizer.eos_token_id

  def __str__(self) -> str:
    return f'{self._path}, {self.size:,} pieces'

  def encode(self, text: str) -> list[int]:
    return self._tokenizer(text, add_special_tokens=False)['input_ids']

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
    return self._tokenizer(list(texts), add_special_tokens=False)['input_ids']

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def chat(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation, by the tokenizer's template, up to where the
    assistant speaks.

    Args:
      turns: {'role': 'user', 'content': text} and the like.

    Raises:
      ValueError: it has no template, or that refuses the turns.
    """
    from jinja2 import TemplateError

    if not self._tokenizer.chat_template:
      raise ValueError(
        f'the tokenizer of {self._path!r} has no chat template; leave out '
        '--chat, or name a model that has one'
      )
    try:
      text = self._tokenizer.apply_chat_template(
        list(turns), tokenize=False, add_generation_prompt=True
      )
    except TemplateError as e:
      raise ValueError(
        f'the chat template of {self._path!r} refuses the turns ({e}); change '
        'their roles or order'
      ) from None
    return self.encode(text)


def vocabulary(name: str, model_path: str = '') -> Vocabulary:
  """Makes the vocabulary of a config.

  Args:
    name: 'bytes', a tokenizer's directory or hub name, or '' for the one in
      `model_path`.

  Raises:
    ValueError: no tokenizer is there.
  """
  if name == 'bytes' or (not name and model_path.startswith('package:')):
    return Bytes()
  if not name and not model_path:
    raise ValueError("set config.data.vocabulary: a path, or 'bytes'")
  return Tokenizer(os.path.expanduser(name or model_path))
