# SPDX-License-Identifier: Apache-2.0
"""Rows of an evaluation, with every example's figure, so that runs pair up.

One JSON object a line for each task, prompt and measure.
"""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from moepeft.core import files, untrusted
from moepeft.evaluation import bootstrap

# Fractions in [0, 1]; loss is in nats a token, bleu from 0 to 100.
MEASURES = ('accuracy', 'loss', 'exact_match', 'rouge_l', 'bleu')
HELD_OUT = 'held_out'


@dataclasses.dataclass(frozen=True)
class About:
  """What all rows of one evaluation share.

  Attributes:
    run: the work directory's path as it was given.
    method: the method's text, 'none' for the base alone.
    semantics: 'official' or 'paper'.
    base: the base's name.
    base_parameters, parameters: of the base, and trained.
    seed, step: of the run.
    data: the rows' file or directory, 'held_out' for the run's own.
    data_sha: 12 hexadecimal digits of the SHA-256 of that data's content.
    inputs_length, targets_length: tokens that texts were cut to, EOS included.
    checkpoint: which was asked for: 'latest', 'best', 'base' or a step.

  The last four are None in rows that were written before they were.
  """

  run: str
  method: str
  semantics: str
  base: str
  base_parameters: int
  parameters: int
  seed: int
  step: int
  data: str
  data_sha: str | None = dataclasses.field(default=None, kw_only=True)
  inputs_length: int | None = dataclasses.field(default=None, kw_only=True)
  targets_length: int | None = dataclasses.field(default=None, kw_only=True)
  checkpoint: str | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Row(About):
  """One line.

  Attributes:
    task, prompt, measure: what was measured.
    value: sum(each) / sum(weights); a library's figure for bleu.
    low, high: ends of its 95 % bootstrap interval over examples; None for
      none.
    examples: how many were measured.
    chance, majority: accuracies of guessing, and of always giving the most
      frequent label; None for other measures.
    cut: measured examples whose text was cut to the model's lengths.
    left_out: examples that could not be ranked.
    idx: which examples [n].
    each: figures [n]: 1 or 0, or nats; None for bleu.
    weights: [n]: 1, or an example's real target tokens; None for bleu.
  """

  task: str
  prompt: str
  measure: str
  value: float
  low: float | None
  high: float | None
  examples: int
  chance: float | None
  majority: float | None
  cut: int
  left_out: int
  idx: tuple[int, ...]
  each: tuple[float, ...] | None
  weights: tuple[float, ...] | None


def measured(
  about: About,
  task: str,
  prompt: str,
  measure: str,
  idx: Sequence[int],
  each: Sequence[float] | None,
  weights: Sequence[float] | None = None,
  *,
  value: float | None = None,
  chance: float | None = None,
  majority: float | None = None,
  cut: int = 0,
  left_out: int = 0,
) -> Row:
  """The row of some figures, with its value and interval.

  Args:
    idx: the examples [n].
    each: their figures [n]; None where a measure has none, and `value` says
      what it comes to.
    weights: [n]; by default 1 each.

  Raises:
    ValueError: the figures come to no finite number.
  """
  low = high = None
  if each is not None:
    weights = (1,) * len(idx) if weights is None else weights
    value = float(np.sum(each) / np.sum(weights))
  if value is None or not math.isfinite(value):
    raise ValueError(
      f'{measure} of {task!r}, prompt {prompt!r}, is {value}, no finite '
      'number; see whether the run has diverged'
    )
  if each is not None:
    table = bootstrap.table([idx], [each], [weights])
    if len(table[0]) > 1:
      low, high = bootstrap.interval(bootstrap.means(*table, task)[:, 0])
  return Row(
    **vars(about),
    task=task,
    prompt=prompt,
    measure=measure,
    value=value,
    low=low,
    high=high,
    examples=len(idx),
    chance=chance,
    majority=majority,
    cut=cut,
    left_out=left_out,
    idx=_plain(idx),
    each=_plain(each),
    weights=_plain(weights),
  )


def majority(labels: Sequence[int]) -> float:
  """The share of the most frequent label of some rows."""
  return max(collections.Counter(labels).values()) / len(labels)


def write(path: str, rows: Iterable[Row]) -> None:
  """Writes a file of rows: all of it or nothing.

  Raises:
    OSError: the file cannot be written; what was there before is whole.
  """
  files.write_text(path, ''.join(map(_line, rows)))


def read(path: str) -> list[Row]:
  """All rows of a file.

  Raises:
    ValueError: no file or no rows there, or a line that is not a row.
  """
  if not os.path.exists(path):
    raise ValueError(
      f'{path!r} does not exist; make it with python -m moepeft.evaluate'
    )
  with files.open_file(path, 'r') as lines:
    try:
      rows = [_row(line, path, i) for i, line in enumerate(lines, 1)]
    except UnicodeDecodeError:
      raise ValueError(
        f'{path} is no text; expected the rows of python -m moepeft.evaluate'
      ) from None
  if not rows:
    raise ValueError(
      f'{path} holds no rows; make it again with python -m moepeft.evaluate'
    )
  return rows


def _plain(values: Sequence[float] | None) -> tuple | None:
  """Numbers as JSON has them."""
  return None if values is None else tuple(np.asarray(values).tolist())


def _line(row: Row) -> str:
  return json.dumps(vars(row), allow_nan=False, ensure_ascii=False) + '\n'


def _row(line: str, path: str, number: int) -> Row:
  try:
    found = untrusted.parse_json(line, allow_nan=False)
    wrong = _wrong(found)
  except untrusted.Malformed as e:
    wrong = str(e)
  if wrong:
    raise ValueError(
      f'line {number} of {path} is no row of an evaluation: {wrong}; make the '
      'file again with python -m moepeft.evaluate'
    )
  arrays = {k: found[k] and tuple(found[k]) for k in ('idx', 'each', 'weights')}
  return Row(**found | arrays)


_TEXTS = ('run', 'method', 'semantics', 'base', 'data', 'task', 'prompt')
_COUNTS = (
  'base_parameters',
  'parameters',
  'seed',
  'step',
  'examples',
  'cut',
  'left_out',
)
_OPTIONAL = ('low', 'high', 'chance', 'majority')
# What older rows lack.
_LATER = {
  'data_sha': str,
  'inputs_length': int,
  'targets_length': int,
  'checkpoint': str,
}


def _wrong(row) -> str:
  """What is wrong with a row, in words; '' for nothing."""
  if not isinstance(row, dict):
    return 'expected a JSON object'
  fields = {field.name for field in dataclasses.fields(Row)}
  missing, other = fields - row.keys() - _LATER.keys(), row.keys() - fields
  if missing or other:
    return f'it lacks {sorted(missing)}, and has the unknown {sorted(other)}'
  for key in _TEXTS:
    if not isinstance(row[key], str):
      return f'expected text in {key!r}, got {row[key]!r}'
  for key in _COUNTS:
    if type(row[key]) is not int or not _number(row[key]):
      return f'expected a whole number in {key!r}, got {row[key]!r}'
  for key, kind in _LATER.items():
    if row.get(key) is not None and type(row[key]) is not kind:
      return f'expected {kind.__name__} or null in {key!r}, got {row[key]!r}'
  for key in ('value', *_OPTIONAL):
    if not _number(row[key]) and (row[key] is not None or key == 'value'):
      return f'expected a number in {key!r}, got {row[key]!r}'
  if row['measure'] not in MEASURES:
    return (
      f'the measure is one of {", ".join(MEASURES)}, got {row["measure"]!r}'
    )
  return _wrong_arrays(row)


def _wrong_arrays(row: dict) -> str:
  if (row['each'] is None) != (row['weights'] is None):
    return "one of 'each' and 'weights' is null, and the other is not"
  for key in ('idx', 'each', 'weights'):
    values = row[key]
    if values is None and key != 'idx':
      continue
    if not isinstance(values, list) or not all(map(_number, values)):
      return f'expected a list of numbers in {key!r}'
    if len(values) != row['examples']:
      return f'{key!r} has {len(values)} entries for {row["examples"]} examples'
  return '' if row['examples'] > 0 else "'examples' is at least 1"


def _number(value) -> bool:
  # JSON has integers that no float holds.
  if type(value) is int:
    return abs(value) < 2**63
  return type(value) is float and math.isfinite(value)
