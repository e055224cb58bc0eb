# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: a run's figures, one JSON object a line.

Every row has a 'step'. Rows of training have 'loss' and more, and at each log
interval 'routing'; rows of validation have 'validation_loss'.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moepeft.core import files, untrusted

# What a site of a row's 'routing' has by layer and expert, under one of these
# keys: 'weight' where the router is dense, 'tokens' where it is sparse. 'load'
# is in rows from before the two were told apart: a token counts 1/k for each of
# its k experts, and of a dense router for the expert with the largest weight,
# however little that is ahead.
SHARES = {
  'weight': 'mean weight',
  'tokens': 'token share',
  'load': 'argmax share',
}


class MetricsLog:
  """A file of JSON lines with a 'step' each; a kill tears at most the last."""

  def __init__(self, path: str, step: int = 0):
    """Lines of steps after `step` are dropped: they will be done again."""
    self.path = path
    _drop_after(self.path, step)
    # Unbuffered: a line is with the system, or was never begun.
    self._file = open(self.path, 'ab', buffering=0)

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a row; infinite and undefined numbers become null.

    Raises:
      OSError: the disk is full; the file ends with a whole line all the same.
    """
    line = (json.dumps(_finite(row), allow_nan=False) + '\n').encode()
    end = os.fstat(self._file.fileno()).st_size
    try:
      written = 0
      while written < len(line):
        written += self._file.write(line[written:])
    except OSError:
      os.ftruncate(self._file.fileno(), end)
      raise

  def close(self) -> None:
    self._file.close()


def stream(path: str) -> Iterator[dict[str, Any]]:
  """The rows of a file, one by one; none if it does not exist.

  A torn last line, which a kill left, is passed over.

  Raises:
    ValueError: another line is no row.
  """
  for _, row in _lines(path, _check_figures):
    yield row


def shares(site: Mapping[str, Any]) -> tuple[str, list]:
  """(key of SHARES, [l][e]) of a site; a site without layers gets one.

  Where layers have unlike counts of experts (the row has 'experts'), the lists
  have unlike lengths.

  Args:
    site: a value of a row's 'routing'.
  """
  key = next(key for key in SHARES if key in site)
  values = site[key]
  layers = values if isinstance(values[0], list) else [values]
  counts = site.get('experts')
  if counts is None:
    return key, layers
  counts = counts if isinstance(counts, list) else [counts]
  return key, [v[: int(c or 0)] for v, c in zip(layers, counts, strict=True)]


def share_array(site: Mapping[str, Any]) -> tuple[str, np.ndarray]:
  """`shares` as an array [l, e], NaN where a layer has no such expert."""
  key, layers = shares(site)
  array = np.full((len(layers), max(map(len, layers))), np.nan)
  for row, layer in zip(array, layers, strict=True):
    row[: len(layer)] = layer
  return key, array


def read(path: str) -> list[dict[str, Any]]:
  """All of `stream` at once."""
  return list(stream(path))


def _lines(
  path: str, check: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[bytes, dict[str, Any]]]:
  if not os.path.exists(path):
    return
  with files.open_file(path) as lines:
    for number, line in enumerate(lines, 1):
      if line.endswith(b'\n'):
        yield line, _row(line, path, number, check)


def _row(
  line: bytes,
  path: str,
  number: int,
  check: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  try:
    row = untrusted.parse_json(line, allow_nan=False)
    untrusted.check_shape(row, {'step': int})
    check(row)
  except untrusted.Malformed as e:
    raise ValueError(
      f'line {number} of {path} is no row of a run ({e}); remove that line'
    ) from None
  return row


# Figures of a site: one, one a layer, or one for each expert of each layer.
# Numbers that are not finite are null.
_NUMBER = (float, None)
_FIGURES = (float, None, [_NUMBER], [[_NUMBER]])
_SITE = {f'{share}?': ([[_NUMBER]], [_NUMBER]) for share in SHARES}
_SITE |= {'entropy': (*_NUMBER, [_NUMBER])}


def _check_figures(row: dict[str, Any]) -> None:
  """
  Raises:
    Malformed: a figure is no number, or the layers of a site have others.
  """
  for key, value in row.items():
    # Rows of another version may say yes or no of something.
    if key != 'routing' and not isinstance(value, bool):
      untrusted.check_shape(value, (float, None), key)
  untrusted.check_shape(row, {'routing?': {str: _SITE}})
  for site, values in row.get('routing', {}).items():
    _check_site(values, f'routing.{site}')


def _check_site(values: Mapping[str, Any], where: str) -> None:
  if not any(share in values for share in SHARES):
    raise untrusted.Malformed(f'{where!r} has no share of experts')
  for key, value in values.items():
    untrusted.check_shape(value, _FIGURES, f'{where}.{key}')
    if isinstance(value, list) and len({*map(_length, value)}) != 1:
      raise untrusted.Malformed(
        f'expected layers of as many figures each in {where + "." + key!r}'
      )


def _length(value: Any) -> int:
  return len(value) if isinstance(value, list) else -1


def _drop_after(path: str, step: int) -> None:
  """Cuts a file, whose steps ascend, after the last row of a step.

  A cut is done or not at any moment, and unlike a copy needs no space.
  """
  if not os.path.exists(path):
    return
  end = 0
  for line, row in _lines(path, lambda row: None):
    if row['step'] > step:
      break
    end += len(line)
  os.truncate(path, end)


def is_number(value: object) -> bool:
  """Whether a value of a row is a finite number; others are null there."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _finite(value: Any) -> Any:
  """A row as JSON can hold it: NaN and the infinities as None."""
  if isinstance(value, Mapping):
    return {key: _finite(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
