# SPDX-License-Identifier: Apache-2.0
"""Rows of any source: checks, and the policy for bad ones.

A training row has `inputs` and `targets`; a row to rank has `inputs`,
`choices` and `label`. `dataset` (or `task`), `template` and `idx` are kept
where they are given.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moepeft.data.row_fields import (
  BYTE_ORDER_MARK,
  RowFields,
  UnusedFields,
  join_names,
)
from moepeft.data.row_fields import BadRow as BadRow
from moepeft.tasks import Example

# (a table's row, its place in the table) -> its example; None where there is
# none to make.
Maker = Callable[[Mapping, int], Example | None]
# Of the reason that a bad row has.
_MOST_LETTERS = 600
# NumPy and JAX hold no larger integer.
_MIN_IDX, _MAX_IDX = -(2**63), 2**63 - 1


class BadRows:
  """The policy for bad rows: an error, or a list of reasons.

  Attributes:
    reasons: 'FILE, line 7: what is wrong', one for each row left out.
    unused: the fields of good rows that nothing reads.
    left_out: names in the directory that are no data files.
  """

  def __init__(self, on_bad_row: str = 'error', ignore: str = ''):
    """
    Args:
      ignore: config.data.ignore_fields.

    Raises:
      ValueError: `on_bad_row` is neither 'error' nor 'skip'.
    """
    if on_bad_row not in ('error', 'skip'):
      raise ValueError(
        f"config.data.on_bad_row is 'error' or 'skip'; got {on_bad_row!r}"
      )
    self._skip = on_bad_row == 'skip'
    self.reasons: list[str] = []
    self.unused = UnusedFields(ignore)
    self.left_out: list[str] = []

  def __call__(self, where: str, wrong: BadRow) -> None:
    reason = f'{where}: {_shortened(str(wrong))}'
    if not self._skip:
      raise ValueError(reason) from None
    self.reasons.append(reason)

  def notes(self, path: str) -> list[str]:
    """Lines on what of a source was not read, bad rows aside."""
    lines = []
    if self.left_out:
      lines.append(
        f'{path}: left out, as no data files: {join_names(self.left_out)}'
      )
    return lines + self.unused.notes(path)


def _shortened(message: str) -> str:
  """A message without the middle of what it quotes at length."""
  if len(message) <= _MOST_LETTERS:
    return message
  half = _MOST_LETTERS // 2
  return f'{message[:half]} ... {message[-half:]}'


@dataclasses.dataclass(frozen=True)
class ExampleRows(Sequence):
  """A sequence of examples, with what was left out on the way.

  Attributes:
    examples: the good ones, in the order of the source.
    skipped: why each bad row was left out: where it stands and what is wrong.
    inapplicable: how often a template had nothing to say of a row.
    remarks: lines on what was not read; see `Bad.notes`.
  """

  examples: Sequence[Example]
  skipped: tuple[str, ...] = ()
  inapplicable: int = 0
  remarks: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, place):
    return self.examples[place]

  def notes(self, path: str) -> list[str]:
    """Lines that tell a user what was left out; none where nothing was."""
    lines = []
    if self.skipped:
      count = len(self.skipped)
      lines.append(
        f'skipped {count:,} bad row{"s" * (count > 1)} of {path}, the first: '
        f'{self.skipped[0]}'
      )
    if self.inapplicable:
      lines.append(
        f'{self.inapplicable:,} pairs of row and template of {path} are left '
        'out: the template renders nothing there'
      )
    return lines + list(self.remarks)


def checked_rows(
  path: str, examples: Sequence[Example], bad: BadRows, inapplicable: int = 0
) -> ExampleRows:
  """The rows that were read under a path.

  Raises:
    ValueError: no good row.
  """
  if examples:
    return ExampleRows(
      examples, tuple(bad.reasons), inapplicable, tuple(bad.notes(path))
    )
  if bad.reasons:
    raise ValueError(
      f'{path} holds {len(bad.reasons):,} bad rows and no good one, the first: '
      f'{bad.reasons[0]}'
    )
  raise ValueError(f'{path} holds no rows; expected at least one')


@dataclasses.dataclass(frozen=True)
class LazyExamples(Sequence):
  """Examples made of a table's rows when they are asked for.

  It holds two integers an example, so a table on disk may be larger than
  memory; and it can be pickled where the table and the makers can.

  Attributes:
    table: what has a length and gives a row for a place.
    makers: each makes at most one example of a row.
    places: int32 [examples, 2], a row's place and a maker's.
  """

  table: Sequence[Mapping]
  makers: tuple[Maker, ...]
  places: np.ndarray

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, place):
    if isinstance(place, slice):
      return dataclasses.replace(self, places=self.places[place])
    i, maker = map(int, self.places[place])
    return self.makers[maker](self.table[i], i)


def lazy_examples(
  path: str,
  table: Sequence[Mapping],
  makers: tuple[Maker, ...],
  where: Callable[[int], str],
  bad: BadRows,
) -> ExampleRows:
  """Makes every example once, to know which there are; see `Made`.

  Args:
    path: named in errors.
    table: the rows.
    makers: of examples, in this order for each row.
    where: a row's place in words.
    bad: told of the rows that a maker cannot make an example of.

  Raises:
    ValueError: no example, or a maker that fails on every row.
  """
  places, none = [], 0
  failures: dict[int, list[str]] = {i: [] for i in range(len(makers))}
  for i, row in enumerate(table):
    for j, make in enumerate(makers):
      try:
        if make(row, i) is None:
          none += 1
        else:
          places.append((i, j))
      except BadRow as e:
        bad(where(i), e)
        failures[j].append(bad.reasons[-1])
  for wrong in failures.values():
    if wrong and len(wrong) == len(table):
      # Not a bad row but a bad template, or the wrong one.
      raise ValueError(f'no row of {path} is good, the first: {wrong[0]}')
  indices = np.array(places, np.int32).reshape(-1, 2)
  return checked_rows(path, LazyExamples(table, makers, indices), bad, none)


def parse_example(
  row: Mapping,
  name: str,
  ranked: bool = False,
  unused: UnusedFields | None = None,
) -> Example:
  """Looks at one row and makes its example.

  Args:
    row: its fields.
    name: the task where the row names no dataset.
    ranked: whether it must have choices and a label.
    unused: told of the fields that are not read.

  Raises:
    BadRow: it is not of the form.
  """
  if 'idx' in row and row['idx'] is None:
    # A table has no absent fields, a row of JSON has.
    _idx(None)
  row = RowFields(row, unused=unused)
  choices, label = _choices(row)
  targets = row.get('targets', choices[label] if choices else None)
  for field, value in (('inputs', row.get('inputs')), ('targets', targets)):
    if not isinstance(value, str) or not value.strip() or _torn(value):
      raise BadRow(
        f'expected text in {field!r}, got {value!r}; mend or remove the row'
      )
  if ranked and not choices:
    raise BadRow(
      f"a row to rank has 'choices' and 'label'; got {', '.join(sorted(row))}"
    )
  task = _text(row, 'task')
  parsed = Example(
    task=_text(row, 'dataset') or task or name,
    template=_text(row, 'template'),
    idx=_idx(row.get('idx', -1)),
    inputs=row['inputs'].removeprefix(BYTE_ORDER_MARK),
    targets=targets.removeprefix(BYTE_ORDER_MARK),
    choices=choices,
    label=label,
  )
  row.close({parsed.inputs.strip(), parsed.targets.strip()})
  return parsed


def check_surrogates(row: Any) -> None:
  """Looks for what JSON can spell and no text can hold, in all of a row.

  Raises:
    BadRow: half of a surrogate pair stands in it.
  """
  fields = row.items() if isinstance(row, Mapping) else [('the row', row)]
  for name, value in fields:
    try:
      json.dumps([name, value], ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise BadRow(
        f'half of a character (a lone surrogate) stands in {name!a}; mend or '
        'remove the row'
      ) from None


def _torn(text: str) -> bool:
  """Whether half of a surrogate pair stands in it, which no file can hold."""
  return not text.isascii() and any('\ud800' <= c <= '\udfff' for c in text)


def _text(row: Mapping, field: str) -> str:
  value = row.get(field, '')
  if not isinstance(value, str) or _torn(value):
    raise BadRow(f'expected text in {field!r}, got {value!r}')
  return value


def _idx(idx) -> int:
  if isinstance(idx, str):
    # One number for one id, wherever it occurs.
    return zlib.crc32(idx.encode(errors='surrogatepass'))
  if type(idx) is not int:
    raise BadRow(f"expected a whole number or text in 'idx', got {idx!r}")
  if not _MIN_IDX <= idx <= _MAX_IDX:
    raise BadRow(
      f"expected an integer of 64 bits in 'idx', got {idx}; number the rows "
      'anew, or write it as text'
    )
  return idx


def has_distinct_choices(choices: Iterable) -> bool:
  """Whether there are two choices or more, all of them different texts."""
  texts = [c for c in choices if isinstance(c, str) and c.strip()]
  return len(set(texts)) >= max(len(list(choices)), 2)


def _choices(row: Mapping) -> tuple[tuple[str, ...], int]:
  """A row's choices and the place of the right one; ((), -1) without any."""
  choices, label = row.get('choices', ''), row.get('label')
  if choices in ('', []):
    return (), -1
  if not isinstance(choices, list) or not has_distinct_choices(choices):
    raise BadRow(
      f"expected two or more different texts in 'choices', got {choices!r}"
    )
  targets = row.get('targets')
  if label is None and targets in choices:
    label = choices.index(targets)
  if type(label) is not int or not 0 <= label < len(choices):
    raise BadRow(
      f'label {label!r} names none of the {len(choices)} choices; labels '
      'count from 0'
    )
  if targets is not None and targets != choices[label]:
    raise BadRow(
      f'the targets {targets!r} are not the choice that the label names, '
      f'{choices[label]!r}'
    )
  return tuple(choices), label
