# SPDX-License-Identifier: Apache-2.0
"""Plain text from files: .txt as it is, .jsonl rows with a field `text`.

A .txt file is one document; its passages are what blank lines separate, or
its lines where it has no blank line. A row of .jsonl is a document of one
passage. Filters leave out passages; what stays keeps its place.
"""

import dataclasses
import gzip
import os
import re
import zlib

from moepeft.core.files import local_path
from moepeft.data import duplicates, jsonl, quality
from moepeft.data.rows import Bad, BadRow

_ENDS = ('.txt', '.txt.gz', '.jsonl', '.jsonl.gz')
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


def read(path: str, on_bad_row: str = 'error') -> tuple[list[Document], Bad]:
  """(the documents of a file or a directory of files, what was skipped).

  Raises:
    ValueError: nothing is there, a file cannot be read, or a bad row.
  """
  bad, found = Bad(on_bad_row), []
  for file in _files(local_path(path)):
    if '.jsonl' in os.path.basename(file):
      found += _rows(file, bad)
    else:
      found += _text(file)
  if not found:
    raise ValueError(f'{path} holds no text; expected at least a line')
  return found, bad


def _files(path: str) -> list[str]:
  if os.path.isfile(path):
    if not path.endswith(_ENDS):
      raise ValueError(
        f'text is read from {", ".join(_ENDS)}; got {path!r}: rename it, or '
        'name a directory of such files'
      )
    return [path]
  if not os.path.isdir(path):
    raise ValueError(
      f'{path!r} does not exist; name a file of {", ".join(_ENDS)}, or a '
      'directory of them'
    )
  found = [f for f in sorted(os.listdir(path)) if f.endswith(_ENDS)]
  if not found:
    raise ValueError(f'{path} holds no file of {", ".join(_ENDS)}')
  return jsonl.check_files([os.path.join(path, f) for f in found])


def _text(file: str) -> list[Document]:
  try:
    with jsonl.opener(file)(file, 'rt', encoding='utf-8-sig') as opened:
      text = opened.read().strip()
  except (UnicodeDecodeError, OSError, EOFError, zlib.error) as e:
    if isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile):
      raise
    raise ValueError(
      f'{file} cannot be read as UTF-8 text ({e}); convert or copy it again'
    ) from None
  separator = '\n\n' if _BLANK.search(text) else '\n'
  parts = _BLANK.split(text) if separator == '\n\n' else text.split('\n')
  passages = tuple(part for part in parts if part.strip())
  return [Document(file, passages, separator)] if passages else []


def _rows(file: str, bad: Bad) -> list[Document]:
  found = []
  for where, row in jsonl.lines(file, bad):
    text = row.get('text')
    if isinstance(text, str) and text.strip():
      found.append(Document(where, (text.strip(),)))
    else:
      wrong = f"expected text in 'text', got {text!r}; mend or remove the row"
      bad(where, BadRow(wrong))
  return found


def filtered(
  found: list[Document], names: str, least: float
) -> tuple[list[Document], list[str]]:
  """(documents without the passages that go, lines that say how many, why).

  Args:
    names: of rules of `moepeft.data.quality`, 'length,repetition'.
    least: the similarity of near duplicates; 0 to leave them in.

  Raises:
    ValueError: there is no such rule, or nothing stays.
  """
  lines, total = [], sum(len(document.passages) for document in found)
  for name, holds in quality.rules(names).items():
    found, gone = _kept(found, [holds(text) for text in _passages(found)])
    said = holds.__doc__.rstrip('.')
    lines.append(f'{gone:,} passages go by the rule {name!r} ({said})')
  if least:
    again = duplicates.repeated(_passages(found), least)
    found, gone = _kept(found, [not repeated for repeated in again])
    lines.append(f'{gone:,} passages go as near duplicates ({least} alike)')
  if not found:
    raise ValueError(
      f'none of {total:,} passages is left: {"; ".join(lines)}; ask less of '
      'them in config.data.quality or config.data.duplicates'
    )
  return found, lines


def _passages(found: list[Document]) -> list[str]:
  return [text for document in found for text in document.passages]


def _kept(
  found: list[Document], keep: list[bool]
) -> tuple[list[Document], int]:
  """(documents of the passages that are kept, how many are not)."""
  flags, documents = iter(keep), []
  for document in found:
    kept = tuple(text for text in document.passages if next(flags))
    if kept:
      documents.append(dataclasses.replace(document, passages=kept))
  return documents, keep.count(False)
