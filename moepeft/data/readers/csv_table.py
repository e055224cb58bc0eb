# SPDX-License-Identifier: Apache-2.0
"""Tables of comma-separated values (RFC 4180), every cell the text as written.

Nothing is inferred: 'NA', '01234', '5' and 'True' are texts, and an empty cell
is the empty text.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence

from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows
from moepeft.data.row_fields import BYTE_ORDER_MARK

# Characters of a cell; the module's own bound is 131,072.
_MOST = 1 << 30


@dataclasses.dataclass(frozen=True)
class CsvTable(Sequence):
  """Rows of texts.

  Attributes:
    column_names: of the header.
    cells: a row's, as many as there are columns.
  """

  column_names: tuple[str, ...]
  cells: Sequence[tuple[str, ...]]

  def __len__(self) -> int:
    return len(self.cells)

  def __getitem__(self, place):
    if isinstance(place, slice):
      return dataclasses.replace(self, cells=self.cells[place])
    return dict(zip(self.column_names, self.cells[place], strict=True))


def read(file: str, bad: BadRows) -> tuple[list[str], CsvTable]:
  """('FILE, line 2' of each row, the rows).

  Args:
    bad: told of rows with more or fewer cells than the header.

  Raises:
    ValueError: it is no such table, or two columns have one name.
  """
  csv.field_size_limit(_MOST)
  places, cells, header = [], [], None
  with fingerprint.open_data_file(file) as stream:
    lines = io.TextIOWrapper(stream, 'utf-8-sig', newline='')
    reader, begin = csv.reader(lines, strict=True), 1
    try:
      for row in reader:
        where, begin = f'{file}, line {begin}', reader.line_num + 1
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
            where,
            BadRow(
              f'{len(row)} cells, and the header has {len(header)}; put a cell '
              'with a comma or a quote in quotes, or remove the row'
            ),
          )
        else:
          places.append(where)
          cells.append(
            tuple(cell.removeprefix(BYTE_ORDER_MARK) for cell in row)
          )
    except (csv.Error, UnicodeDecodeError) as e:
      raise ValueError(
        f'{file}, line {begin}: not CSV in UTF-8 ({e}); write the table anew'
      ) from None
  return places, CsvTable(header or (), cells)


def _header(file: str, row: list[str]) -> tuple[str, ...]:
  while row and not row[-1]:
    row.pop()
  twice = [name for i, name in enumerate(row) if name in row[:i]]
  if twice:
    raise ValueError(
      f'{file} has two columns {twice[0]!r}; give each a name of its own'
    )
  return tuple(row)
