# SPDX-License-Identifier: Apache-2.0
"""Reads plain text from .txt files, and from .jsonl rows' field `text`.

A .txt file is one document; blank lines separate its passages, or each line is
a passage if the file has no blank line. A row of .jsonl is a document of one
passage. Filters remove passages and keep the order of the rest.
"""

import dataclasses
import os
import re
from collections.abc import Iterable

from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import jsonl_rows
from moepeft.data.row_fields import BYTE_ORDER_MARK, RowFields
from moepeft.data.text import dedup, quality

_BLANK = re.compile(r'\n[ \t]*\n\s*')


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, split into passages.

  Attributes:
    name: the file, and the line of a row, for errors.
    passages: at least one, none of them blank.
    separator: the text between two passages.
  """

  name: str
  passages: tuple[str, ...]
  separator: str = '\n\n'


def read_documents(
  path: str, on_bad_row: str = 'error', ignore: str = ''
) -> tuple[list[Document], BadRows]:
  """(the documents of a file or a directory of files, the bad rows).

  Args:
    ignore: config.data.ignore_fields.

  Raises:
    ValueError: there is no text, a file cannot be read, or a row is bad.
  """
  bad, texts = BadRows(on_bad_row, ignore), []
  for file in fingerprint.data_files(path, fingerprint.TEXT_FILES, bad):
    if '.jsonl' in os.path.basename(file).lower():
      texts += _read_jsonl(file, bad)
    else:
      texts += _read_txt(file)
  if not texts:
    raise ValueError(f'{path} has no text; expected at least one line')
  return texts, bad


def _read_txt(file: str) -> list[Document]:
  text = fingerprint.read_text(file).strip()
  separator = '\n\n' if _BLANK.search(text) else '\n'
  parts = _BLANK.split(text) if separator == '\n\n' else text.split('\n')
  passages = tuple(part for part in parts if part.strip())
  return [Document(file, passages, separator)] if passages else []


def _read_jsonl(file: str, bad: BadRows) -> list[Document]:
  documents = []
  for where, row in jsonl_rows.read_lines(file, bad):
    fields = RowFields(row, unused=bad.unused)
    text = fields.get('text')
    try:
      if (
        not isinstance(text, str)
        or not text.removeprefix(BYTE_ORDER_MARK).strip()
      ):
        raise BadRow(
          f"expected text in 'text', got {text!r}; mend or remove the row"
        )
      text = text.removeprefix(BYTE_ORDER_MARK).strip()
      fields.close({text})
      documents.append(Document(where, (text,)))
    except BadRow as e:
      bad(where, e)
  return documents


def filter_documents(
  texts: list[Document], names: str, threshold: float
) -> tuple[list[Document], list[str]]:
  """Removes passages by quality rules, then near duplicates.

  Args:
    names: rules of `moepeft.data.text.quality`, 'length,repetition'.
    threshold: the similarity of near duplicates; 0 keeps them.

  Returns:
    The documents that remain, and a line for each filter, for the user.

  Raises:
    ValueError: there is no such rule, or no passage remains.
  """
  notes, total = [], sum(len(document.passages) for document in texts)
  for name, rule in quality.rules(names).items():
    texts, dropped = _filter_passages(texts, map(rule, _passages(texts)))
    description = rule.__doc__.rstrip('.')
    notes.append(f'{dropped:,} passages fail the rule {name!r} ({description})')
  if threshold:
    is_duplicate = dedup.near_duplicates(_passages(texts), threshold)
    texts, dropped = _filter_passages(texts, [not x for x in is_duplicate])
    notes.append(
      f'{dropped:,} passages are near duplicates (similarity {threshold})'
    )
  if not texts:
    raise ValueError(
      f'no passage of {total:,} remains: {"; ".join(notes)}; loosen '
      'config.data.quality_filters or config.data.dedup_threshold'
    )
  return texts, notes


def _passages(texts: list[Document]) -> list[str]:
  return [text for document in texts for text in document.passages]


def _filter_passages(
  texts: list[Document], keep: Iterable[bool]
) -> tuple[list[Document], int]:
  """(documents with the passages to keep, number of passages dropped)."""
  flags, documents = iter(keep), []
  for document in texts:
    passages = tuple(text for text in document.passages if next(flags))
    if passages:
      documents.append(dataclasses.replace(document, passages=passages))
  return documents, len(_passages(texts)) - len(_passages(documents))
