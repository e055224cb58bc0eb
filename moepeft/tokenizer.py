# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.tokenizer --text=PATH --output=DIR: trains a tokenizer.

BPE (arXiv:1508.07909), the same over bytes, WordPiece, or Unigram
(arXiv:1804.10959), from plain text, into a directory that Hugging Face's
AutoTokenizer reads and that config.data.tokenizer names.
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
  """Each with what separates it from the next."""
  for document in texts:
    for passage in document.passages:
      yield passage + document.separator


@dataclasses.dataclass(frozen=True)
class TokenizerFit:
  """Tokens per word and per byte of texts, and the unknown tokens' share."""

  per_word: float
  per_byte: float
  unknown: float

  def __str__(self) -> str:
    return (
      f'{self.per_word:.3f} tokens a word, {self.per_byte:.3f} a byte, '
      f'{self.unknown:.2%} unknown'
    )


def measure_fit(tokenizer: Any, texts: Sequence[str]) -> TokenizerFit:
  """The fit of a tokenizer to texts that it was not trained on."""
  ids = tokenizer(list(texts), add_special_tokens=False)['input_ids']
  tokens = sum(map(len, ids))
  unknown = sum(row.count(tokenizer.unk_token_id) for row in ids)
  return TokenizerFit(
    tokens / max(sum(len(text.split()) for text in texts), 1),
    tokens / max(sum(len(text.encode()) for text in texts), 1),
    unknown / max(tokens, 1),
  )


def train_and_save(
  form: TokenizerSpec, path: str, output: str, held_out: float
) -> list[str]:
  """Trains, writes a directory and says how it fits what it did not see.

  Raises:
    ValueError: no text, more letters than pieces, or the directory holds
      something or cannot be made.
  """
  if not 0 < held_out < 1:
    raise ValueError(
      f'--held_out is a share above 0 and below 1; got {held_out}'
    )
  output = _made(output)
  tokenizer, bad = documents.read_documents(path)
  texts = list(passage_texts(tokenizer))
  cut = len(texts) - max(1, round(len(texts) * held_out))
  if not cut:
    raise ValueError(
      f'{path} holds one passage; expected at least two, one to train on and '
      'one to look at'
    )
  tokenizer = train(form, texts[:cut])
  tokenizer.save_pretrained(output)
  lines = [f'{cut:,} passages read; {len(texts) - cut:,} held out']
  lines += bad.notes(path)
  if len(tokenizer) < form.size:
    lines.append(
      f'the text has no more than {len(tokenizer):,} of '
      f'--size={form.size:,} pieces'
    )
  lines.append(f'{form.kind}, {len(tokenizer):,} pieces, on held-out text:')
  lines.append(f'  {measure_fit(tokenizer, texts[cut:])}')
  lines.append(f'wrote {output}: --config.data.tokenizer={output}')
  return lines


def _made(output: str) -> str:
  """An empty directory, made before any time is spent."""
  output = os.path.expanduser(output)
  if os.path.isfile(output):
    raise ValueError(f'{output!r} is a file; name a directory with --output')
  try:
    os.makedirs(output, exist_ok=True)
    full = bool(os.listdir(output))
  except OSError as e:
    raise ValueError(
      f'{output!r} cannot be made ({e.strerror}); name another with --output'
    ) from None
  if full:
    raise ValueError(f'{output!r} is not empty; name another with --output')
  return output


def main(argv) -> None:
  del argv
  if not _TEXT.value or not _OUTPUT.value:
    raise ValueError(
      '--text names a file or directory of plain text, --output the directory '
      'to write; give both'
    )
  form = TokenizerSpec(
    _KIND.value, _SIZE.value, _EXTRA_IDS.value, _CHAT.value, _LIBRARY.value
  )
  lines = train_and_save(form, _TEXT.value, _OUTPUT.value, _HELD_OUT.value)
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
