# SPDX-License-Identifier: Apache-2.0
"""Reads tables of comma-separated values (RFC 4180); every cell is a text.

No type is inferred: 'NA', '01234', '5' and 'True' are texts, and an empty cell
is the empty text.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence

from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows
from moepeft.data.row_fields import BYTE_ORDER_MARK

# In characters; Python's csv module has a limit of 131,072.
_MAX_CELL_LENGTH = 1 << 30


@dataclasses.dataclass(frozen=True)
class CsvTable(Sequence):
  """Rows of texts.

  Attributes:
    column_names: the header.
    cells: the cells of each row, one for each column.
  """

  column_names: tuple[str, ...]
  cells: Sequence[tuple[str, ...]]

  def __len__(self) -> int:
    return len(self.cells)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return dataclasses.replace(self, cells=self.cells[index])
    return dict(zip(self.column_names, self.cells[index], strict=True))


def read(file: str, bad: BadRows) -> tuple[list[str], CsvTable]:
  """('FILE, line 2' of each row, the rows).

  Args:
    bad: called with rows that have more or fewer cells than the header.

  Raises:
    ValueError: the file is not CSV, or two columns have the same name.
  """
  csv.field_size_limit(_MAX_CELL_LENGTH)
  locations, cells, header = [], [], None
  with fingerprint.open_data_file(file) as stream:
    lines = io.TextIOWrapper(stream, 'utf-8-sig', newline='')
    reader, line = csv.reader(lines, strict=True), 1
    try:
      for row in reader:
        # A row with line breaks in its cells has several lines.
        location, line = f'{file}, line {line}', reader.line_num + 1
        if not row:
          continue
        if header is None:
          header = _header(file, row)
          continue
        # Spreadsheets write empty cells after the last column.
        while len(row) > len(header) and not row[-1]:
          row.pop()
        if len(row) != len(header):
          bad(
            location,
            BadRow(
              f'{len(row)} cells, and the header has {len(header)}; put a cell '
              'with a comma or a quote in quotes, or remove the row'
            ),
          )
        else:
          locations.append(location)
          cells.append(
            tuple(cell.removeprefix(BYTE_ORDER_MARK) for cell in row)
          )
    except (csv.Error, UnicodeDecodeError) as e:
      raise ValueError(
        f'{file}, line {line}: not CSV in UTF-8 ({e}); export the table again'
      ) from None
  return locations, CsvTable(header or (), cells)


def _header(file: str, row: list[str]) -> tuple[str, ...]:
  while row and not row[-1]:
    row.pop()
  duplicates = [name for i, name in enumerate(row) if name in row[:i]]
  if duplicates:
    raise ValueError(
      f'{file} has two columns {duplicates[0]!r}; rename one of them'
    )
  return tuple(row)
