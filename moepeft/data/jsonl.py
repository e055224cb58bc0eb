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
import zlib
from collections.abc import Iterator, Sequence

from moepeft.tasks import Example

# Above this many different targets, a template's answers count as open.
_MAX_CHOICES = 8


def read(path: str, ranked: bool = False) -> list[Example]:
  """All rows under a path, in the order of file names and lines.

  Args:
    ranked: whether every row must have choices and a label.

  Raises:
    ValueError: nothing there, no rows, or a row that is not of the form; the
      message names the file and the line.
  """
  examples = []
  for file in _files(os.path.expanduser(path)):
    name = os.path.basename(file).split('.jsonl')[0]
    for number, row in _rows(file):
      where = f'{file}, line {number}'
      examples.append(_example(row, name, where))
      if ranked and not examples[-1].choices:
        raise ValueError(
          f"{where}: a row to rank has 'choices' and 'label'; got "
          f'{", ".join(sorted(row))}'
        )
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
  # Some editors begin a file with a byte order mark.
  opener = gzip.open if file.endswith('.gz') else open
  opened = opener(file, 'rt', encoding='utf-8-sig')
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
    raise ValueError(
      f'{file}, line {number}: expected an object {{...}}; mend or remove the '
      'line'
    )
  return row


def _example(row: dict, name: str, where: str) -> Example:
  choices, label = _choices(row, where)
  targets = row.get('targets', choices[label] if choices else None)
  for field, value in (('inputs', row.get('inputs')), ('targets', targets)):
    if not isinstance(value, str) or not value.strip():
      raise ValueError(
        f'{where}: expected text in {field!r}, got {value!r}; mend or remove '
        'the row'
      )
  idx = row.get('idx', -1)
  if isinstance(idx, str):
    # One number for one id, wherever it occurs.
    idx = zlib.crc32(idx.encode())
  if type(idx) is not int:
    raise ValueError(
      f"{where}: expected a whole number or text in 'idx', got {idx!r}"
    )
  return Example(
    task=row.get('dataset') or row.get('task') or name,
    template=row.get('template', ''),
    idx=idx,
    inputs=row['inputs'],
    targets=targets,
    choices=choices,
    label=label,
  )


def _choices(row: dict, where: str) -> tuple[tuple[str, ...], int]:
  """A row's choices and the place of the right one; ((), -1) without any."""
  choices = row.get('choices')
  if not choices:
    return (), -1
  texts = isinstance(choices, list) and all(
    isinstance(choice, str) and choice.strip() for choice in choices
  )
  if not texts or len(set(choices)) < max(len(choices), 2):
    raise ValueError(
      f"{where}: expected two or more different texts in 'choices', got "
      f'{choices!r}'
    )
  label, targets = row.get('label'), row.get('targets')
  if label is None and targets in choices:
    label = choices.index(targets)
  if type(label) is not int or not 0 <= label < len(choices):
    raise ValueError(
      f'{where}: label {label!r} names none of the {len(choices)} choices; '
      'labels count from 0'
    )
  if targets is not None and targets != choices[label]:
    raise ValueError(
      f'{where}: the targets {targets!r} are not the choice that the label '
      f'names, {choices[label]!r}'
    )
  return tuple(choices), label


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
