# SPDX-License-Identifier: Apache-2.0
"""Rows in P3's form: `.jsonl` or `.jsonl.gz`, one file or a directory.

The fields of a row are in `moepeft.data.example`.
"""

import collections
import os
import re
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from moepeft.core import untrusted
from moepeft.core.files import local_path
from moepeft.data import example as example_lib
from moepeft.data import fingerprint
from moepeft.data.dataset import TrainingData, from_examples
from moepeft.data.example import BadRow, BadRows, ExampleRows
from moepeft.data.readers.reader import DataReader, ReadContext
from moepeft.tasks import Example

# How JSON spells a half of a surrogate pair, which may stand alone.
SURROGATE_ESCAPE = re.compile(rb'\\u[dD][89a-fA-F]')
# Above this many different targets, a template's answers count as open.
_MAX_CHOICES = 8


def read(
  path: str, ranked: bool = False, on_bad_row: str = 'error', ignore: str = ''
) -> ExampleRows:
  """All rows under a path, in the order of file names and lines.

  Args:
    path: a file or a directory.
    ranked: whether every row must have choices and a label.
    on_bad_row: 'error', or 'skip': it is left out, and `Rows.skipped` has the
      reason. A compressed file that ends early is an error in any case.
    ignore: fields that may be left unused, of config.data.ignore_fields.

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


def with_closed_choices(
  train: Sequence[Example], validation: Sequence[Example]
) -> list[Example]:
  """The validation rows of templates with few answers, with their choices.

  The choices of a template are the targets that occur in training; rows whose
  own target is not among them are left out.
  """
  answers = collections.defaultdict(set)
  for e in train:
    answers[e.task, e.template].add(e.targets)
  ranked = []
  for e in validation:
    choices = tuple(sorted(answers[e.task, e.template]))
    if 2 <= len(choices) <= _MAX_CHOICES and e.targets in choices:
      ranked.append(
        Example(
          **{
            **vars(e),
            'choices': choices,
            'label': choices.index(e.targets),
          }
        )
      )
  return ranked


def open_jsonl(data: ConfigDict, context: ReadContext) -> TrainingData:
  """Opens rows in P3's form; the last `idx` of each dataset are held out."""
  if not data.path:
    raise ValueError(
      'set config.data.path to .jsonl rows, or a directory of them'
    )
  rows = read(data.path, on_bad_row=data.on_bad_row, ignore=data.ignore_fields)
  return from_examples(rows, data, context.seed)


READER = DataReader(
  open_jsonl,
  config_keys=(
    *(
      'data.path',
      'data.templates',
      'data.mixture',
      'data.max_examples_per_task',
    ),
    *(
      'data.temperature',
      'data.on_bad_row',
      'data.ignore_fields',
      'data.truncation',
    ),
    *('data.num_workers', 'data.replay', 'data.replay_rate'),
  ),
  files=fingerprint.ROW_FILES,
  is_seeded=False,
)
