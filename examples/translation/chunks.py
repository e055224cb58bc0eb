# SPDX-License-Identifier: Apache-2.0
"""Splits a text into chunks whose concatenation is the text."""

import re

# Ends of paragraphs, of lines, of sentences and of words; a chunk ends at the
# first kind that makes it short enough. Chinese has no space between sentences.
_ENDS = (
  r'\r?\n[ \t]*\r?\n\s*',
  r'\r?\n',
  r'(?<=[.!?…])["\'”’)\]]*\s+|(?<=[。！？；])["\'”’）」』]*\s*',
  r'\s+',
)


def split(text: str, limit: int, ends: tuple[str, ...] = _ENDS) -> list[str]:
  """Splits a text into chunks of at most `limit` characters.

  A chunk has as many whole paragraphs as fit. A longer paragraph is cut after
  sentences, a longer sentence after words, and a longer word anywhere.

  Raises:
    ValueError: the limit is below 1.
  """
  if limit < 1:
    raise ValueError(f'a chunk has at least one character; got {limit}')
  if len(text) <= limit:
    return [text] if text else []
  if not ends:
    return [text[i : i + limit] for i in range(0, len(text), limit)]
  chunks: list[str] = []
  for piece in _pieces(text, ends[0]):
    if chunks and len(chunks[-1]) + len(piece) <= limit:
      chunks[-1] += piece
    else:
      chunks += split(piece, limit, ends[1:])
  return chunks


def _pieces(text: str, end: str) -> list[str]:
  """Cuts a text after each match of a pattern."""
  matches = [match.end() for match in re.finditer(end, text)]
  cuts = [0, *(cut for cut in matches if cut < len(text)), len(text)]
  return [text[i:j] for i, j in zip(cuts, cuts[1:], strict=False) if i < j]


def join(chunks: list[str], translations: list[str]) -> str:
  """Joins translations with the whitespace that surrounds their chunks.

  Between two chunks without a line break in between, a space is set after a
  text of a script with spaces, and none after Chinese or Japanese.
  """
  texts = []
  for i, (chunk, text) in enumerate(zip(chunks, translations, strict=True)):
    start = chunk[: len(chunk) - len(chunk.lstrip())]
    end = chunk[len(chunk.rstrip()) :] if chunk.strip() else ''
    if i < len(chunks) - 1 and '\n' not in end and text:
      end = '' if re.search(r'[\u3000-\u9fff\uff00-\uffef]$', text) else ' '
    texts.append(start + text + end)
  return ''.join(texts)
