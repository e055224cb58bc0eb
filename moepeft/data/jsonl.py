# SPDX-License-Identifier: Apache-2.0
"""Rows in P3's form: `.jsonl` or `.jsonl.gz`, one file or a directory.

The fields of a row are in `moepeft.data.rows`.
"""

import collections
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence

from moepeft.core.files import local_path
from moepeft.data import rows as rows_lib
from moepeft.data.rows import Bad, BadRow, Rows
from moepeft.tasks import Example

# How JSON spells a half of a surrogate pair, which may stand alone.
HALF = re.compile(rb'\\u[dD][89a-fA-F]')
# Above this many different targets, a template's answers count as open.
_MAX_CHOICES = 8


def read(path: str, ranked: bool = False, on_bad_row: str = 'error') -> Rows:
  """All rows under a path, in the order of file names and lines.

  Args:
    path: a file or a directory.
    ranked: whether every row must have choices and a label.
    on_bad_row: 'error', or 'skip': it is left out, and `Rows.skipped` has the
      reason. A compressed file that ends early is an error in any case.

  Raises:
    ValueError: nothing there, no good rows, or a row that is not of the form;
      the message names the file and the line.
  """
  bad = Bad(on_bad_row)
  examples = []
  for file in _files(local_path(path)):
    name = os.path.basename(file).split('.jsonl')[0]
    for where, row in lines(file, bad):
      try:
        examples.append(rows_lib.example(row, name, ranked))
      except BadRow as e:
        bad(where, e)
  return rows_lib.rows(path, examples, bad)


def _files(path: str) -> list[str]:
  if os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    raise ValueError(
      f'{path!r} does not exist; name a .jsonl or .jsonl.gz file, or a '
      'directory of them'
    )
  found = [f for f in sorted(os.listdir(path)) if '.jsonl' in f]
  if not found:
    raise ValueError(f'{path} holds no .jsonl or .jsonl.gz file')
  return check_files([os.path.join(path, f) for f in found])


def check_files(found: Sequence[str]) -> list[str]:
  """The same.

  Raises:
    ValueError: one of them is a directory, though named as a file is.
  """
  for file in found:
    if os.path.isdir(file):
      raise ValueError(
        f'{file} is a directory, expected a file of that name; rename it, or '
        'name it itself'
      )
  return list(found)


def opener(file: str):
  """What opens a file: `open`, or `gzip.open` for a .gz."""
  return gzip.open if file.endswith('.gz') else open


def lines(file: str, bad: Bad) -> Iterator[tuple[str, dict]]:
  """('FILE, line 1', object) of every line that is not empty.

  Raises:
    ValueError: the file cannot be read to its end, or as `bad` does.
  """
  with opener(file)(file, 'rb') as opened:
    try:
      for number, line in enumerate(opened, 1):
        where = f'{file}, line {number}'
        try:
          if line.strip():
            yield where, _parse(line)
        except BadRow as e:
          bad(where, e)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise ValueError(
        f'{file} cannot be read to its end ({e}); copy it again'
      ) from None


def _parse(line: bytes) -> dict:
  try:
    # Some editors begin a file with a byte order mark.
    row = json.loads(line.decode('utf-8-sig'))
  except (ValueError, RecursionError) as e:
    # The decoder's own text counts lines too, from the row's beginning.
    reason = getattr(e, 'msg', e)
    raise BadRow(f'not JSON ({reason}); mend or remove the line') from None
  if not isinstance(row, dict):
    raise BadRow('expected an object {...}; mend or remove the line')
  if HALF.search(line):
    rows_lib.check_whole(row)
  return row


def split(
  examples: Sequence[Example], held_out: float
) -> tuple[list[Example], list[Example]]:
  """(training, validation): the last `held_out` of each dataset's idx.

  Templates of one dataset share examples, so the split goes by `idx`; rows
  without one go by their order.
  """
  keys = collections.defaultdict(set)
  numbered = [(e, e.idx if e.idx >= 0 else i) for i, e in enumerate(examples)]
  for e, key in numbered:
    keys[e.task].add(key)
  first = {}
  for task, found in keys.items():
    ordered = sorted(found)
    cut = len(ordered) - int(round(len(ordered) * held_out))
    first[task] = ordered[cut] if cut < len(ordered) else float('inf')
  train = [e for e, key in numbered if key < first[e.task]]
  validation = [e for e, key in numbered if key >= first[e.task]]
  if not train:
    raise ValueError(f'held_out={held_out} leaves no row to train on')
  return train, validation


def closed(
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
