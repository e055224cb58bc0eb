# SPDX-License-Identifier: Apache-2.0
"""Rows in P3's form: `.jsonl` or `.jsonl.gz`, one file or a directory.

The fields of a row are in `moepeft.data.example`.
"""

import os
import re
from collections.abc import Iterator

from moepeft.core import untrusted
from moepeft.core.files import local_path
from moepeft.data import example as example_lib
from moepeft.data import fingerprint
from moepeft.data.example import BadRow, BadRows, ExampleRows

# How JSON spells a half of a surrogate pair, which may stand alone.
SURROGATE_ESCAPE = re.compile(rb'\\u[dD][89a-fA-F]')


def read(
  path: str, ranked: bool = False, on_bad_row: str = 'error', ignore: str = ''
) -> ExampleRows:
  """All rows under a path, in the order of file names and lines.

  Args:
    path: a file or a directory.
    ranked: whether every row must have choices and a label.
    on_bad_row: 'error', or 'skip' to leave bad rows out; see
      `ExampleRows.skipped`. A truncated compressed file is always an error.
    ignore: config.data.ignore_fields.

  Raises:
    ValueError: nothing there, no good rows, or a row that is not of the form;
      the message names the file and the line.
  """
  bad = BadRows(on_bad_row, ignore)
  examples = []
  for file in _files(local_path(path), bad):
    name = re.split(r'\.jsonl', os.path.basename(file), flags=re.I)[0]
    for where, row in read_lines(file, bad):
      try:
        examples.append(
          example_lib.parse_example(row, name, ranked, bad.unused)
        )
      except BadRow as e:
        bad(where, e)
  return example_lib.checked_rows(path, examples, bad)


def _files(path: str, bad: BadRows) -> list[str]:
  # A file that is named itself may have any name.
  if os.path.isfile(path):
    return [path]
  return fingerprint.data_files(path, fingerprint.ROW_FILES, bad)


def read_lines(file: str, bad: BadRows) -> Iterator[tuple[str, dict]]:
  """('FILE, line 1', object) of every line that is not empty.

  Raises:
    ValueError: the file cannot be read to its end, or as `bad` does.
  """
  with fingerprint.open_data_file(file) as stream:
    for number, line in enumerate(stream, 1):
      where = f'{file}, line {number}'
      try:
        if line.strip():
          yield where, _parse(line)
      except BadRow as e:
        bad(where, e)


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
