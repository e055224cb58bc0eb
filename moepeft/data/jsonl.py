# SPDX-License-Identifier: Apache-2.0
"""Rows in P3's form: `.jsonl` or `.jsonl.gz`, one file or a directory.

A training row has `inputs` and `targets`; a row to rank has `inputs`,
`choices` and `label`. `dataset` (or `task`), `template` and `idx` are kept
where they are given.
"""

import collections
import gzip
import json
import os
from collections.abc import Iterator, Sequence

from moepeft.tasks import Example

# Above this many different targets, a template's answers count as open.
_MAX_CHOICES = 8


def read(path: str) -> list[Example]:
  """All rows under a path, in the order of file names and lines.

  Raises:
    ValueError: nothing there, no rows, or a row that is not of the form; the
      message names the file and the line.
  """
  examples = []
  for file in _files(os.path.expanduser(path)):
    name = os.path.basename(file).split('.jsonl')[0]
    for number, row in _rows(file):
      examples.append(_example(row, name, f'{file}, line {number}'))
  if not examples:
    raise ValueError(f'{path} holds no rows; expected JSON lines')
  return examples


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
  return [os.path.join(path, f) for f in found]


def _rows(file: str) -> Iterator[tuple[int, dict]]:
  opened = gzip.open(file, 'rt') if file.endswith('.gz') else open(file)
  with opened as lines:
    try:
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield number, _parse(line, file, number)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as e:
      raise ValueError(
        f'{file} cannot be read to its end ({e}); copy it again'
      ) from None


def _parse(line: str, file: str, number: int) -> dict:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as e:
    raise ValueError(
      f'{file}, line {number}: not JSON ({e.msg}); mend or remove the line'
    ) from None
  if not isinstance(row, dict):
    raise ValueError(f'{file}, line {number}: expected an object {{...}}')
  return row


def _example(row: dict, name: str, where: str) -> Example:
  choices = tuple(row.get('choices', ()))
  label = row.get('label', -1)
  targets = row.get('targets')
  if choices and targets is None:
    if not isinstance(label, int) or not 0 <= label < len(choices):
      raise ValueError(f'{where}: label {label!r} names none of the choices')
    targets = choices[label]
  for field, value in (('inputs', row.get('inputs')), ('targets', targets)):
    if not isinstance(value, str) or not value.strip():
      raise ValueError(
        f'{where}: expected text in {field!r}, got {value!r}; mend or remove '
        'the row'
      )
  return Example(
    task=row.get('dataset') or row.get('task') or name,
    template=row.get('template', ''),
    idx=row.get('idx', -1),
    inputs=row['inputs'],
    targets=targets,
    choices=choices,
    label=label,
  )


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
