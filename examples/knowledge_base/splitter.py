# SPDX-License-Identifier: Apache-2.0
"""Splits documents into passages of whole sentences, and texts into terms."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator

from examples.knowledge_base.loaders import Document

_CJK = '\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af'
# The end of a paragraph, a heading or a list's item; of a sentence.
_BLOCK_END = re.compile(r'\n\s*\n|\n(?=#|\s*[-*|])')
_SENTENCE_END = re.compile(
  r'(?:(?<=[.!?])|(?<=[.!?]["\')]))\s+(?=["\'(]*[A-Z0-9])'
  r'|(?<=[\u3002\uff01\uff1f])'
)
_UNITS = re.compile(rf'[{_CJK}]|[^\W_{_CJK}]+|[^\w\s]|_')
_RUNS = re.compile(rf'[{_CJK}]+|[^\W_{_CJK}]+')
# Characters of a word that a sentence encoder reads as one token, about.
_UNIT_LENGTH = 5


@dataclasses.dataclass(frozen=True)
class Passage:
  """A part of a document that a search returns.

  Attributes:
    source, title: those of the document.
    text: whole sentences in their order, one a line.
  """

  source: str
  title: str
  text: str

  @property
  def indexed(self) -> str:
    """The text that is embedded and searched: a passage alone often lacks
    its subject, which the title has."""
    return f'{self.title}\n{self.text}'


def sentences(text: str) -> Iterator[str]:
  """Yields sentences and headings."""
  for block in _BLOCK_END.split(text):
    if not block.startswith('#'):
      for sentence in _SENTENCE_END.split(block):
        if sentence.strip():
          yield ' '.join(sentence.split())
    elif block.strip('# \n'):
      heading, _, rest = block.partition('\n')
      yield heading.strip()
      yield from sentences(rest)


def size(text: str) -> int:
  """An estimate of the tokens of a text, rather high.

  A word counts once for each five characters, a character of Chinese, Japanese
  or Korean once, as does a punctuation mark.
  """
  return sum(-(-len(unit) // _UNIT_LENGTH) for unit in _UNITS.findall(text))


def split(document: Document, max_size: int, overlap: int) -> list[Passage]:
  """Splits a document.

  Args:
    max_size: the greatest `size` of a passage's text; longer sentences are cut.
    overlap: the greatest `size` of the sentences that two passages share.

  Raises:
    ValueError: the overlap is not smaller than half the size.
  """
  if not 0 <= 2 * overlap < max_size:
    raise ValueError(
      f'the overlap, {overlap}, is below half the size of a passage, {max_size}'
    )
  passages, window = [], []
  for sentence in sentences(document.text):
    for piece in _cut(sentence, max_size):
      if window and _sum(window) + size(piece) > max_size:
        passages.append(_passage(document, window))
        while window and (
          _sum(window) > overlap or _sum(window) + size(piece) > max_size
        ):
          window = window[1:]
      window = [*window, piece]
  return [*passages, _passage(document, window)] if window else passages


def _sum(window: list[str]) -> int:
  return sum(map(size, window))


def _passage(document: Document, window: list[str]) -> Passage:
  return Passage(document.source, document.title, '\n'.join(window))


def _cut(sentence: str, max_size: int) -> Iterator[str]:
  """Cuts a sentence that is longer than a passage between its words."""
  while size(sentence) > max_size:
    units, end = 0, 0
    for match in _UNITS.finditer(sentence):
      units += size(match[0])
      if units > max_size and end:
        break
      end = match.end()
    yield sentence[:end].strip()
    sentence = sentence[end:].strip()
  if sentence:
    yield sentence


def terms(text: str) -> list[str]:
  """The terms of a text for keyword search, the same for every store.

  Words are without case, accents and the plural's ending (Harman's S stemmer,
  1991); Chinese, Japanese and Korean are pairs of characters, as their words
  have no spaces between them.
  """
  text = unicodedata.normalize('NFKD', text.casefold())
  text = ''.join(c for c in text if not unicodedata.combining(c))
  text = unicodedata.normalize('NFKC', text)
  result = []
  for run in _RUNS.findall(text):
    if re.match(rf'[{_CJK}]', run):
      pairs = [run[i : i + 2] for i in range(len(run) - 1)]
      result += pairs or [run]
    else:
      result.append(_stem(run))
  return result


def _stem(word: str) -> str:
  if len(word) > 3 and word.endswith('ies') and word[-4] not in 'ae':
    return f'{word[:-3]}y'
  if len(word) > 3 and word.endswith('es') and word[-3] not in 'aeo':
    return word[:-1]
  if len(word) > 2 and word.endswith('s') and word[-2] not in 'us':
    return word[:-1]
  return word
