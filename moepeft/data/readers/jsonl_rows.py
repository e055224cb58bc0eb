# SPDX-License-Identifier: Apache-2.0
"""Reads rows in P3's form from `.jsonl` or `.jsonl.gz` files.

`moepeft.data.example` defines the fields of a row.
"""

import os
import re
from collections.abc import Iterator

from moepeft.core import untrusted
from moepeft.core.files import local_path
from moepeft.data import example as example_lib
from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows, ExampleRows

# JSON's escape of one half of a surrogate pair. The other half may be missing.
SURROGATE_ESCAPE = re.compile(rb'\\u[dD][89a-fA-F]')


def read(
  path: str, ranked: bool = False, on_bad_row: str = 'error', ignore: str = ''
) -> ExampleRows:
  """Reads all rows under a path, in the order of file names and lines.

  Args:
    path: a file or a directory.
    ranked: whether every row must have choices and a label.
    on_bad_row: 'error', or 'skip' to leave bad rows out; see
      `ExampleRows.skipped`. A truncated compressed file is always an error.
    ignore: config.data.ignore_fields.

  Raises:
    ValueError: there is no file or no good row, or a row is bad; the message
      names the file and the line.
  """
  bad = BadRows(on_bad_row, ignore)
  examples = []
  for file in row_files(path, bad):
    name = re.split(r'\.jsonl', os.path.basename(file), flags=re.I)[0]
    for location, row in read_lines(file, bad):
      try:
        examples.append(
          example_lib.parse_example(row, name, ranked, bad.unused)
        )
      except BadRow as e:
        bad(location, e)
  return example_lib.checked_rows(path, examples, bad)


def row_files(path: str, bad: BadRows) -> list[str]:
  """The file, or the directory's files of rows."""
  path = local_path(path)
  # Only the files of a directory need the ending.
  if os.path.isfile(path):
    return [path]
  return fingerprint.data_files(path, fingerprint.ROW_FILES, bad)


def read_lines(file: str, bad: BadRows) -> Iterator[tuple[str, dict]]:
  """Yields ('FILE, line 1', object) for each line that is not blank.

  Raises:
    ValueError: the file cannot be read to its end, or `bad` raises it.
  """
  with fingerprint.open_data_file(file) as stream:
    for number, line in enumerate(stream, 1):
      location = f'{file}, line {number}'
      try:
        if line.strip():
          yield location, _parse(line)
      except BadRow as e:
        bad(location, e)


def _parse(line: bytes) -> dict:
  try:
    row = untrusted.parse_json(line, check_text=False, unique_keys=True)
  except untrusted.Malformed as e:
    raise BadRow(f'{e}; mend or remove the line') from None
  if not isinstance(row, dict):
    raise BadRow('expected an object {...}; mend or remove the line')
  if SURROGATE_ESCAPE.search(line):
    example_lib.check_surrogates(row)
  return row
