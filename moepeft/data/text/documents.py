# SPDX-License-Identifier: Apache-2.0
"""Plain text from files: .txt as it is, .jsonl rows with a field `text`.

A .txt file is one document; its passages are what blank lines separate, or
its lines where it has no blank line. A row of .jsonl is a document of one
passage. Filters leave out passages; what stays keeps its place.
"""

import dataclasses
import os
import re

from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import jsonl_rows
from moepeft.data.row_fields import BYTE_ORDER_MARK, RowFields
from moepeft.data.text import dedup, quality

_BLANK = re.compile(r'\n[ \t]*\n\s*')


@dataclasses.dataclass(frozen=True)
class Document:
  """A text in passages.

  Attributes:
    name: where it stands, for errors.
    passages: not empty.
    separator: what stands between two of them.
  """

  name: str
  passages: tuple[str, ...]
  separator: str = '\n\n'


def read_documents(
  path: str, on_bad_row: str = 'error', ignore: str = ''
) -> tuple[list[Document], BadRows]:
  """(the documents of a file or a directory of files, what was skipped).

  Args:
    ignore: fields that may be left unused, of config.data.ignore_fields.

  Raises:
    ValueError: nothing is there, a file cannot be read, or a bad row.
  """
  bad, texts = BadRows(on_bad_row, ignore), []
  for file in fingerprint.data_files(path, fingerprint.TEXT_FILES, bad):
    if '.jsonl' in os.path.basename(file).lower():
      texts += _rows(file, bad)
    else:
      texts += _text(file)
  if not texts:
    raise ValueError(f'{path} holds no text; expected at least a line')
  return texts, bad


def _text(file: str) -> list[Document]:
  text = fingerprint.read_text(file).strip()
  separator = '\n\n' if _BLANK.search(text) else '\n'
  parts = _BLANK.split(text) if separator == '\n\n' else text.split('\n')
  passages = tuple(part for part in parts if part.strip())
  return [Document(file, passages, separator)] if passages else []


def _rows(file: str, bad: BadRows) -> list[Document]:
  rows = []
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
      rows.append(Document(where, (text,)))
    except BadRow as e:
      bad(where, e)
  return rows


def filter_documents(
  texts: list[Document], names: str, least: float
) -> tuple[list[Document], list[str]]:
  """(documents without the passages that go, lines that say how many, why).

  Args:
    names: of rules of `moepeft.data.text.quality`, 'length,repetition'.
    least: the similarity of near duplicates; 0 to leave them in.

  Raises:
    ValueError: there is no such rule, or nothing stays.
  """
  lines, total = [], sum(len(document.passages) for document in texts)
  for name, holds in quality.rules(names).items():
    texts, dropped = _filter_passages(
      texts, [holds(text) for text in _passages(texts)]
    )
    description = holds.__doc__.rstrip('.')
    lines.append(
      f'{dropped:,} passages go by the rule {name!r} ({description})'
    )
  if least:
    again = dedup.near_duplicates(_passages(texts), least)
    texts, dropped = _filter_passages(
      texts, [not repeated for repeated in again]
    )
    lines.append(f'{dropped:,} passages go as near duplicates ({least} alike)')
  if not texts:
    raise ValueError(
      f'none of {total:,} passages is left: {"; ".join(lines)}; ask less of '
      'them in config.data.quality_filters or config.data.dedup_threshold'
    )
  return texts, lines


def _passages(texts: list[Document]) -> list[str]:
  return [text for document in texts for text in document.passages]


def _filter_passages(
  texts: list[Document], keep: list[bool]
) -> tuple[list[Document], int]:
  """(documents of the passages that are kept, how many are not)."""
  flags, documents = iter(keep), []
  for document in texts:
    passages = tuple(text for text in document.passages if next(flags))
    if passages:
      documents.append(dataclasses.replace(document, passages=passages))
  return documents, keep.count(False)
