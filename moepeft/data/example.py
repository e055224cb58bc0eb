# SPDX-License-Identifier: Apache-2.0
"""Checks of rows from any source, and the policy for bad rows.

A training row has `inputs` and `targets`; a row to rank has `inputs`,
`choices` and `label`. `dataset` (or `task`), `template`, `idx` and `embedding`
(a list of numbers, for routers) are kept where they are given.
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

# (row, its index in the table) -> an example; None where a template renders
# nothing.
ExampleFn = Callable[[Mapping, int], Example | None]
_MAX_MESSAGE_CHARS = 600
# NumPy and JAX hold no larger integer.
_MIN_IDX, _MAX_IDX = -(2**63), 2**63 - 1


class BadRows:
  """The policy for bad rows: an error, or a list of reasons.

  Attributes:
    reasons: 'FILE, line 7: the fault', one for each row that was skipped.
    unused: the fields of good rows that nothing reads.
    left_out: names in the directory that are not data files.
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

  def __call__(self, where: str, error: BadRow) -> None:
    reason = f'{where}: {_shorten(str(error))}'
    if not self._skip:
      raise ValueError(reason) from None
    self.reasons.append(reason)

  def notes(self, path: str) -> list[str]:
    """Lines about files and fields of a source that were not read."""
    lines = []
    if self.left_out:
      lines.append(
        f'{path}: left out, as no data files: {join_names(self.left_out)}'
      )
    return lines + self.unused.notes(path)


def _shorten(message: str) -> str:
  """Cuts the middle of a long message, which quotes a long value."""
  if len(message) <= _MAX_MESSAGE_CHARS:
    return message
  half = _MAX_MESSAGE_CHARS // 2
  return f'{message[:half]} ... {message[-half:]}'


@dataclasses.dataclass(frozen=True)
class ExampleRows(Sequence):
  """A sequence of examples, and counts of the rows that gave none.

  Attributes:
    examples: the good examples, in the order of the source.
    skipped: the reason of each bad row; see `BadRows.reasons`.
    inapplicable: the number of (row, template) pairs that render nothing.
    unread_notes: lines about what was not read; see `BadRows.notes`.
  """

  examples: Sequence[Example]
  skipped: tuple[str, ...] = ()
  inapplicable: int = 0
  unread_notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index):
    return self.examples[index]

  def notes(self, path: str) -> list[str]:
    """Lines for the user about rows and files that were left out."""
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
    return lines + list(self.unread_notes)


def checked_rows(
  path: str, examples: Sequence[Example], bad: BadRows, inapplicable: int = 0
) -> ExampleRows:
  """The examples of a path, with the reasons of its bad rows.

  Raises:
    ValueError: there is no good row.
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
  """Examples that are made from a table's rows on access.

  It holds two integers an example, so that a table on disk may be larger than
  memory. It can be pickled if the table and the functions can.

  Attributes:
    table: rows, by index.
    example_fns: functions that make at most one example of a row each.
    indices: int32 [examples, 2]: the indices of the row and of the function.
  """

  table: Sequence[Mapping]
  example_fns: tuple[ExampleFn, ...]
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return dataclasses.replace(self, indices=self.indices[index])
    row, fn = map(int, self.indices[index])
    return self.example_fns[fn](self.table[row], row)


def lazy_examples(
  path: str,
  table: Sequence[Mapping],
  example_fns: tuple[ExampleFn, ...],
  where: Callable[[int], str],
  bad: BadRows,
) -> ExampleRows:
  """Makes every example once, to find the rows that give one.

  Args:
    path: named in errors.
    table: the rows.
    example_fns: applied to each row, in this order.
    where: row index -> the row's file and line, for messages.
    bad: called with each row of which no example can be made.

  Raises:
    ValueError: there is no example, or a function fails on every row.
  """
  indices, inapplicable = [], 0
  failures: dict[int, list[str]] = {i: [] for i in range(len(example_fns))}
  for i, row in enumerate(table):
    for j, example_fn in enumerate(example_fns):
      try:
        if example_fn(row, i) is None:
          inapplicable += 1
        else:
          indices.append((i, j))
      except BadRow as e:
        bad(where(i), e)
        failures[j].append(bad.reasons[-1])
  for reasons in failures.values():
    if reasons and len(reasons) == len(table):
      # The template is at fault, not the rows.
      raise ValueError(f'no row of {path} is good, the first: {reasons[0]}')
  index_array = np.array(indices, np.int32).reshape(-1, 2)
  examples = LazyExamples(table, example_fns, index_array)
  return checked_rows(path, examples, bad, inapplicable)


def parse_example(
  row: Mapping,
  name: str,
  ranked: bool = False,
  unused: UnusedFields | None = None,
) -> Example:
  """Checks one row and makes its example.

  Args:
    row: field name -> value.
    name: the task of a row that names no dataset.
    ranked: whether the row must have choices and a label.
    unused: collects the names of fields that are not read.

  Raises:
    BadRow: a field is missing or has a wrong value.
  """
  if 'idx' in row and row['idx'] is None:
    # RowFields drops nulls, and a null idx is an error.
    _parse_idx(None)
  row = RowFields(row, unused=unused)
  choices, label = _parse_choices(row)
  targets = row.get('targets', choices[label] if choices else None)
  for field, value in (('inputs', row.get('inputs')), ('targets', targets)):
    if not isinstance(value, str) or not value.strip() or _has_surrogate(value):
      raise BadRow(
        f'expected text in {field!r}, got {value!r}; mend or remove the row'
      )
  if ranked and not choices:
    raise BadRow(
      f"a row to rank has 'choices' and 'label'; got {', '.join(sorted(row))}"
    )
  task = _parse_text(row, 'task')
  parsed = Example(
    task=_parse_text(row, 'dataset') or task or name,
    template=_parse_text(row, 'template'),
    idx=_parse_idx(row.get('idx', -1)),
    inputs=row['inputs'].removeprefix(BYTE_ORDER_MARK),
    targets=targets.removeprefix(BYTE_ORDER_MARK),
    choices=choices,
    label=label,
    embedding=parse_embedding(row.get('embedding')),
  )
  row.close({parsed.inputs.strip(), parsed.targets.strip()})
  return parsed


def check_surrogates(row: Any) -> None:
  """Refuses rows with lone surrogates, which JSON has and UTF-8 has not.

  Raises:
    BadRow: a field, at any depth, has a lone surrogate.
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


def _has_surrogate(text: str) -> bool:
  """Whether a text has a surrogate, which UTF-8 cannot encode."""
  return not text.isascii() and any('\ud800' <= c <= '\udfff' for c in text)


def _parse_text(row: Mapping, field: str) -> str:
  value = row.get(field, '')
  if not isinstance(value, str) or _has_surrogate(value):
    raise BadRow(f'expected text in {field!r}, got {value!r}')
  return value


def parse_embedding(value: Any) -> np.ndarray | None:
  """float32 [i] of a list of finite numbers; None for any other value, which
  a table may have for other purposes and only some methods read."""
  if not isinstance(value, list | tuple | np.ndarray) or not len(value):
    return None
  try:
    embedding = np.asarray(value, np.float32)
  except (TypeError, ValueError, OverflowError):
    return None
  is_vector = embedding.ndim == 1 and np.isfinite(embedding).all()
  return embedding if is_vector else None


def _parse_idx(idx) -> int:
  if isinstance(idx, str):
    # The hash gives a text the same idx in every file.
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
  """Whether there are two or more choices, all texts and all different."""
  texts = [c for c in choices if isinstance(c, str) and c.strip()]
  return len(set(texts)) >= max(len(list(choices)), 2)


def _parse_choices(row: Mapping) -> tuple[tuple[str, ...], int]:
  """(choices, index of the correct choice); ((), -1) for a row without."""
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
