# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.tokenizer --text=PATH --output=DIR: trains a tokenizer.

The tokenizer is BPE (arXiv:1508.07909), byte-level BPE, WordPiece or Unigram
(arXiv:1804.10959), trained on plain text. Hugging Face's AutoTokenizer and
config.data.tokenizer read the output directory.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from moepeft.config import command_line
from moepeft.data.text import documents
from moepeft.data.text.documents import Document
from moepeft.data.tokenizers.train_tokenizer import (
  KINDS,
  LIBRARIES,
  TokenizerSpec,
  train,
)


def passage_texts(texts: Sequence[Document]) -> Iterator[str]:
  """Yields the passages of documents, with their separators."""
  for document in texts:
    for passage in document.passages:
      yield passage + document.separator


@dataclasses.dataclass(frozen=True)
class TokenizerFit:
  """Tokens per word and per byte of texts, and the share of unknown tokens."""

  per_word: float
  per_byte: float
  unknown: float

  def __str__(self) -> str:
    return (
      f'{self.per_word:.3f} tokens a word, {self.per_byte:.3f} a byte, '
      f'{self.unknown:.2%} unknown'
    )


def measure_fit(tokenizer: Any, texts: Sequence[str]) -> TokenizerFit:
  """Measures the fit of a tokenizer to held-out texts."""
  ids = tokenizer(list(texts), add_special_tokens=False)['input_ids']
  tokens = sum(map(len, ids))
  unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
  return TokenizerFit(
    tokens / max(sum(len(text.split()) for text in texts), 1),
    tokens / max(sum(len(text.encode()) for text in texts), 1),
    unknown / max(tokens, 1),
  )


def train_and_save(
  spec: TokenizerSpec, path: str, output: str, held_out: float
) -> list[str]:
  """Trains and saves a tokenizer; returns lines about its fit.

  Raises:
    ValueError: there is no text, it has more letters than pieces, or the
      directory is not empty or cannot be made.
  """
  if not 0 < held_out < 1:
    raise ValueError(
      f'--held_out is a share above 0 and below 1; got {held_out}'
    )
  output = _make_empty_directory(output)
  passages, skipped_lines = documents.read_documents(path)
  texts = list(passage_texts(passages))
  train_count = len(texts) - max(1, round(len(texts) * held_out))
  if not train_count:
    raise ValueError(
      f'{path} holds one passage; expected at least two, one for training and '
      'one held out'
    )
  tokenizer = train(spec, texts[:train_count])
  tokenizer.save_pretrained(output)
  lines = [
    f'{train_count:,} passages read; {len(texts) - train_count:,} held out'
  ]
  lines += skipped_lines.notes(path)
  if len(tokenizer) < spec.size:
    lines.append(
      f'the text has no more than {len(tokenizer):,} of '
      f'--size={spec.size:,} pieces'
    )
  lines.append(f'{spec.kind}, {len(tokenizer):,} pieces, on held-out text:')
  lines.append(f'  {measure_fit(tokenizer, texts[train_count:])}')
  lines.append(f'wrote {output}: --config.data.tokenizer={output}')
  return lines


def _make_empty_directory(output: str) -> str:
  """Makes the output directory, which must be empty; returns its path."""
  output = os.path.expanduser(output)
  if os.path.isfile(output):
    raise ValueError(f'{output!r} is a file; name a directory with --output')
  try:
    os.makedirs(output, exist_ok=True)
    has_files = bool(os.listdir(output))
  except OSError as e:
    raise ValueError(
      f'{output!r} cannot be made ({e.strerror}); name another with --output'
    ) from None
  if has_files:
    raise ValueError(f'{output!r} is not empty; name another with --output')
  return output


def main(argv) -> None:
  del argv
  if not _TEXT.value or not _OUTPUT.value:
    raise ValueError(
      '--text names a file or directory of plain text, --output the directory '
      'to write; give both'
    )
  spec = TokenizerSpec(
    _KIND.value, _SIZE.value, _EXTRA_IDS.value, _CHAT.value, _LIBRARY.value
  )
  lines = train_and_save(spec, _TEXT.value, _OUTPUT.value, _HELD_OUT.value)
  print('\n'.join(lines))


if __name__ == '__main__':
  _TEXT = flags.DEFINE_string('text', None, 'A .txt or .jsonl, or many.')
  _OUTPUT = flags.DEFINE_string('output', None, 'A directory to write.')
  _KIND = flags.DEFINE_enum('kind', 'bytes', list(KINDS), 'Of the pieces.')
  _SIZE = flags.DEFINE_integer(
    'size',
    8000,
    'Pieces, special ones included.',
    lower_bound=1,
    upper_bound=10_000_000,
  )
  _EXTRA_IDS = flags.DEFINE_integer(
    'extra_ids',
    0,
    'Sentinels for span corruption; T5 has 100.',
    lower_bound=0,
    upper_bound=100_000,
  )
  _CHAT = flags.DEFINE_bool('chat', False, "Add ChatML's tokens and template.")
  _LIBRARY = flags.DEFINE_enum(
    'library', 'tokenizers', list(LIBRARIES), 'The package that trains it.'
  )
  _HELD_OUT = flags.DEFINE_float(
    'held_out',
    0.05,
    'The share of passages that is looked at only.',
    lower_bound=0,
    upper_bound=1,
  )
  command_line.run(main)
