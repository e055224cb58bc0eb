# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: of bytes, or a model's Hugging Face tokenizer."""

import codecs
import contextlib
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from moepeft.checkpoints import pip_models
from moepeft.checkpoints.gguf import model as gguf
from moepeft.checkpoints.gguf import tokenizer as gguf_tokenizer
from moepeft.core import files
from moepeft.data.row_fields import BYTE_ORDER_MARK
from moepeft.data.tokenizers import long_texts

# Endings of the text files in a tokenizer's directory.
_TEXT_ENDINGS = ('.json', '.jinja', '.txt')


class Tokenizer(Protocol):
  """Converts text to token ids and back. Id 0 is padding, as in T5.

  Attributes:
    size: the number of tokens.
    eos: the id of the end-of-sequence token, or None.
    bos: the id that texts of decoder-only models start with, or None.
  """

  size: int
  eos: int | None
  bos: int | None

  def encode(self, text: str) -> list[int]: ...

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]: ...

  def decode(self, ids: list[int]) -> str: ...

  def show(self, ids: list[int]) -> str: ...

  def sentinels(self, vocab_size: int) -> list[int]: ...


def require_eos(tokenizer: Tokenizer) -> int:
  """The id of the end-of-sequence token.

  Raises:
    ValueError: the tokenizer has none.
  """
  if tokenizer.eos is None:
    raise ValueError(
      f'the tokenizer {tokenizer} has no end-of-sequence token; name one as '
      "'eos_token' in its tokenizer_config.json, or set config.data.tokenizer "
      'to a tokenizer that has one'
    )
  return tokenizer.eos


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
  """
  Args:
    vocab_size: the rows of the model's embedding.

  Raises:
    ValueError: the tokenizer has more tokens than the embedding has rows.
  """
  if tokenizer.size > vocab_size:
    raise ValueError(
      f'the vocabulary has {tokenizer.size} tokens, the model {vocab_size}; '
      'set config.data.tokenizer to the tokenizer of the model'
    )


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """UTF-8 bytes plus 3, as in ByT5 (arXiv:2105.13626); it needs no files."""

  size: int = 259
  eos: int = 1
  bos: None = None

  def encode(self, text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
    ids = (np.frombuffer(text.encode(), np.uint8) for text in texts)
    return [row.astype(np.int32) + 3 for row in ids]

  def __str__(self) -> str:
    return 'bytes'

  def decode(self, ids: list[int]) -> str:
    """Drops ids below 3 or above 258; invalid UTF-8 becomes U+FFFD."""
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors='replace')

  def show(self, ids: list[int]) -> str:
    """The text with the names of special tokens, as '<pad>'."""
    names = {0: '<pad>', 1: '<eos>', 2: '<unk>'}
    parts = []
    for is_byte, run in itertools.groupby(ids, lambda i: 3 <= i < 259):
      if is_byte:
        parts.append(self.decode(list(run)))
      else:
        parts += [names.get(i, f'<{i}>') for i in run]
    return ''.join(parts)

  def sentinels(self, vocab_size: int) -> list[int]:
    """Ids of span corruption's sentinels: the model's last ids, descending.

    Args:
      vocab_size: the size of the model's vocabulary.
    """
    return list(range(vocab_size - 1, self.size - 1, -1))


class HuggingFaceTokenizer:
  """A Hugging Face tokenizer; `encode` adds no special tokens."""

  def __init__(self, path: str):
    try:
      self._tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as e:
      reason = str(e).splitlines()[0]
      raise ValueError(
        f'no tokenizer could be read from {path!r} ({reason}); set '
        'config.data.tokenizer to a directory that holds tokenizer.json, or '
        "to 'bytes'"
      ) from None
    self._path = path
    template = self._tokenizer.chat_template
    if isinstance(template, str):
      self._tokenizer.chat_template = template.replace(BYTE_ORDER_MARK, '')
    elif template:
      self._tokenizer.chat_template = {
        name: text.replace(BYTE_ORDER_MARK, '')
        for name, text in template.items()
      }
    self.size = len(self._tokenizer)
    self.eos = self._tokenizer.eos_token_id
    bos = self._tokenizer.bos_token_id
    # Some tokenizers have a BOS that they do not add to texts.
    adds_bos = self._tokenizer('a')['input_ids'][:1] == [bos]
    self.bos = bos if adds_bos else None

  def __str__(self) -> str:
    return f'{self._path}, {self.size:,} pieces'

  @property
  def tokenizer(self) -> Any:
    """The `transformers` tokenizer."""
    return self._tokenizer

  def encode(self, text: str) -> list[int]:
    return self._tokenizer(text, add_special_tokens=False)['input_ids']

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
    return long_texts.encode(self._tokenizer, texts)

  def decode(self, ids: list[int]) -> str:
    # Clean-up, which old files ask for, removes spaces before punctuation.
    return self._tokenizer.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def show(self, ids: list[int]) -> str:
    """The text with special tokens."""
    return self._tokenizer.decode(ids)

  def sentinels(self, vocab_size: int) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1>, ..., as far as they exist."""
    ids_by_token, sentinel_ids = self._tokenizer.get_vocab(), []
    while (name := f'<extra_id_{len(sentinel_ids)}>') in ids_by_token:
      sentinel_ids.append(ids_by_token[name])
    return sentinel_ids


def skipped_special_tokens(tokenizer: Tokenizer, text: str) -> dict[int, str]:
  """Id -> content of the special tokens in a text that `decode` leaves out.

  If the content of a token contains another token's, both are returned.
  """
  if not isinstance(tokenizer, HuggingFaceTokenizer):
    return {}
  return {
    i: token.content
    for i, token in tokenizer.tokenizer.added_tokens_decoder.items()
    if token.content and token.content in text and not tokenizer.decode([i])
  }


def read_tokenizer(path: str) -> Any:
  """Reads a `transformers` tokenizer of a directory, a GGUF file or the hub.

  Raises:
    OSError, ValueError: there is no tokenizer, or it is damaged.
  """
  # Imported here, as the import takes seconds and the default run has no use
  # for it.
  from transformers import AutoTokenizer

  path = pip_models.resolve(path)
  files.check_files(path)
  if path.endswith(gguf.SUFFIX):
    return gguf_tokenizer.read(path)
  _require_sentencepiece(path)
  try:
    with _without_byte_order_marks(path) as folder:
      tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Some errors of a file are raised only when the tokenizer is used.
    if not tokenizer('a')['input_ids'] and len(tokenizer) < 1:
      raise ValueError('it has no tokens')
    for kind in ('bos', 'eos', 'pad', 'unk'):
      getattr(tokenizer, f'{kind}_token_id')
    return tokenizer
  except OSError:
    raise
  except Exception as error:  # tokenizers raises plain Exceptions
    reason = str(error).strip() or type(error).__name__
    raise ValueError(reason) from None


@contextlib.contextmanager
def _without_byte_order_marks(path: str) -> Iterator[str]:
  """Yields a copy of a directory without byte order marks in its text files.

  `transformers` refuses a config with a byte order mark, and treats the mark of
  a template as text.

  Args:
    path: a directory. It is yielded itself if no file has a mark, and so is
      any other path.
  """
  marked = []
  entries = list(os.scandir(path)) if os.path.isdir(path) else []
  for entry in entries:
    if entry.name.endswith(_TEXT_ENDINGS) and entry.is_file():
      with files.open_file(entry.path) as file:
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
          marked.append(entry.name)
  if not marked:
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    for entry in entries:
      copy = os.path.join(folder, entry.name)
      if entry.name in marked:
        files.write_text(copy, files.read_text(entry.path))
      else:
        os.symlink(os.path.abspath(entry.path), copy)
    yield folder


def _require_sentencepiece(path: str) -> None:
  """
  Raises:
    ValueError: a directory has only a SentencePiece tokenizer, and the package
      sentencepiece is not installed.
  """
  model_files = [
    name
    for name in ('spiece.model', 'tokenizer.model')
    if os.path.isfile(os.path.join(path, name))
  ]
  has_json = os.path.isfile(os.path.join(path, 'tokenizer.json'))
  if model_files and not has_json and find_spec('sentencepiece') is None:
    raise ValueError(
      f'{model_files[0]} is read with the package sentencepiece, which is not '
      'installed: pip install sentencepiece'
    )


def load_tokenizer(name: str, model_path: str = '') -> Tokenizer:
  """Loads the tokenizer of a config.

  Args:
    name: 'bytes', a tokenizer's directory or hub name, or '' for the tokenizer
      in `model_path`.

  Raises:
    ValueError: there is no tokenizer.
  """
  if name == 'bytes' or (not name and model_path.startswith('package:')):
    return ByteTokenizer()
  if not name and not model_path:
    raise ValueError(
      'name a model, which brings its tokenizer, by config.model.path (in a '
      'config file: model=), or set config.data.tokenizer to the path of a '
      "tokenizer or 'bytes'"
    )
  return HuggingFaceTokenizer(files.local_path(name or model_path))
