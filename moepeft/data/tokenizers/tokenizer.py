# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: bytes, or a model's own tokenizer."""

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

# Files of a tokenizer's directory that are text.
_TEXTS = ('.json', '.jinja', '.txt')


class Tokenizer(Protocol):
  """Ids 0 and 1 are padding and end of sequence, as in T5."""

  size: int
  # None where texts have no end.
  eos: int | None
  # What texts of decoder-only models begin with, if anything.
  bos: int | None

  def encode(self, text: str) -> list[int]: ...

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]: ...

  def decode(self, ids: list[int]) -> str: ...

  def show(self, ids: list[int]) -> str: ...

  def sentinels(self, below: int) -> list[int]: ...


def require_eos(tokenizer: Tokenizer) -> int:
  """The id that ends a text.

  Raises:
    ValueError: the vocabulary has none.
  """
  if tokenizer.eos is None:
    raise ValueError(
      f'the tokenizer {tokenizer} has no end-of-sequence token; name one as '
      "'eos_token' in its tokenizer_config.json, or set config.data.tokenizer "
      'to a tokenizer that has one'
    )
  return tokenizer.eos


def check_vocab_size(tokenizer: Tokenizer, rows: int) -> None:
  """
  Args:
    rows: of the model's embedding.

  Raises:
    ValueError: the vocabulary has more tokens than the embedding.
  """
  if tokenizer.size > rows:
    raise ValueError(
      f'the vocabulary has {tokenizer.size} tokens, the model {rows}; '
      'set config.data.tokenizer to the tokenizer of the model'
    )


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """UTF-8 bytes plus 3, as in ByT5 (arXiv:2105.13626): no files needed."""

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
    """Ids below 3 or above 258 are dropped; broken UTF-8 is marked."""
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors='replace')

  def show(self, ids: list[int]) -> str:
    """The text, with what is no byte by its name."""
    names = {0: '<pad>', 1: '<eos>', 2: '<unk>'}
    parts = []
    for is_byte, run in itertools.groupby(ids, lambda i: 3 <= i < 259):
      run_ids = list(run)
      named = (names.get(i, f'<{i}>') for i in run_ids)
      parts.append(self.decode(run_ids) if is_byte else ''.join(named))
    return ''.join(parts)

  def sentinels(self, below: int) -> list[int]:
    """Ids that stand for hidden spans: the model's last ones, downwards.

    Args:
      below: the size of the model's vocabulary.
    """
    return list(range(below - 1, self.size - 1, -1))


class HuggingFaceTokenizer:
  """A Hugging Face tokenizer; special tokens are ours to add."""

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
    # Some have one that no text begins with.
    begun = self._tokenizer('a')['input_ids'][:1] == [bos]
    self.bos = bos if begun else None

  def __str__(self) -> str:
    return f'{self._path}, {self.size:,} pieces'

  @property
  def tokenizer(self) -> Any:
    """Hugging Face's own, which has the chat template."""
    return self._tokenizer

  def encode(self, text: str) -> list[int]:
    return self._tokenizer(text, add_special_tokens=False)['input_ids']

  def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
    return long_texts.encode(self._tokenizer, texts)

  def decode(self, ids: list[int]) -> str:
    # Old files ask to take blanks away before signs, which texts may have.
    return self._tokenizer.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def show(self, ids: list[int]) -> str:
    """The text with special tokens."""
    return self._tokenizer.decode(ids)

  def sentinels(self, below: int) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1>, ..., as many as there are."""
    ids_by_token, sentinel_ids = self._tokenizer.get_vocab(), []
    while (name := f'<extra_id_{len(sentinel_ids)}>') in ids_by_token:
      sentinel_ids.append(ids_by_token[name])
    return sentinel_ids


def skipped_special_tokens(tokenizer: Tokenizer, text: str) -> dict[int, str]:
  """{id: content} of the special tokens in a text that `decode` leaves out.

  Where the content of one is within another's, both are there.
  """
  if not isinstance(tokenizer, HuggingFaceTokenizer):
    return {}
  return {
    i: token.content
    for i, token in tokenizer.tokenizer.added_tokens_decoder.items()
    if token.content and token.content in text and not tokenizer.decode([i])
  }


def read_tokenizer(path: str) -> Any:
  """A tokenizer of `transformers`: a directory's, a GGUF file's or the hub's.

  Raises:
    OSError, ValueError: there is none.
  """
  # Imported here: it costs seconds, and the default run needs none of it.
  from transformers import AutoTokenizer

  path = pip_models.resolve(path)
  files.check_files(path)
  if path.endswith(gguf.SUFFIX):
    return gguf_tokenizer.read(path)
  _require_sentencepiece(path)
  try:
    with _without_marks(path) as folder:
      tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Some faults of a file are met only where the tokenizer is used.
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
def _without_marks(path: str) -> Iterator[str]:
  """A directory whose JSON, text and template files have no byte order mark.

  `transformers` calls a config with one damaged, and takes the mark of a
  template for text.

  Args:
    path: a directory, which is yielded itself where no file has a mark; any
      other path is yielded unchanged.
  """
  marked = []
  entries = list(os.scandir(path)) if os.path.isdir(path) else []
  for entry in entries:
    if entry.name.endswith(_TEXTS) and entry.is_file():
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
    ValueError: a directory has a tokenizer of SentencePiece alone, and the
      package that reads it is not installed.
  """
  model_files = [
    name
    for name in ('spiece.model', 'tokenizer.model')
    if os.path.isfile(os.path.join(path, name))
  ]
  whole = os.path.isfile(os.path.join(path, 'tokenizer.json'))
  if model_files and not whole and find_spec('sentencepiece') is None:
    raise ValueError(
      f'{model_files[0]} is read with the package sentencepiece, which is not '
      'installed: pip install sentencepiece'
    )


def load_tokenizer(name: str, model_path: str = '') -> Tokenizer:
  """Makes the vocabulary of a config.

  Args:
    name: 'bytes', a tokenizer's directory or hub name, or '' for the one in
      `model_path`.

  Raises:
    ValueError: no tokenizer is there.
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
