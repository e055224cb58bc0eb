# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: the metrics of a run, one JSON object per line.

Each row has a 'step'. Training rows have 'loss' and other metrics, and at each
log interval 'routing'; validation rows have 'validation_loss'.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moepeft.core import files, untrusted

# Keys of the experts' shares, by layer and expert, of a site in a row's
# 'routing': 'weight' for dense routers, 'tokens' for sparse ones. Older rows
# have 'load' for both: a token counts 1/k for each of its k experts, with a
# dense router for the expert with the largest weight.
SHARES = {
  'weight': 'mean weight',
  'tokens': 'token share',
  'load': 'argmax share',
}


class MetricsLog:
  """A file of JSON lines with a 'step' each.

  If the process is killed, only the last line may be incomplete.
  """

  def __init__(self, path: str, step: int = 0):
    """Removes lines of steps after `step`, which will be trained again."""
    self.path = path
    _drop_after(self.path, step)
    # Unbuffered, so that no line waits in this process.
    self._file = open(self.path, 'ab', buffering=0)

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a row; infinities and NaN become null.

    Raises:
      OSError: the disk is full; the file still ends with a complete line.
    """
    line = (
      json.dumps(_replace_nonfinite(row), allow_nan=False) + '\n'
    ).encode()
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
  """Yields the rows of a file; none if it does not exist.

  An incomplete last line, from a killed process, is ignored.

  Raises:
    ValueError: another line is not a row.
  """
  for _, row in _read_lines(path, _check_metrics):
    yield row


def shares(site: Mapping[str, Any]) -> tuple[str, list]:
  """(key of SHARES, shares [l][e]) of a site.

  A site without layers is given one. The layers' lists have different lengths
  if their numbers of experts ('experts' in the row) differ.

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
  """`shares` as an array [l, e], padded with NaN."""
  key, layers = shares(site)
  array = np.full((len(layers), max(map(len, layers))), np.nan)
  for row, layer in zip(array, layers, strict=True):
    row[: len(layer)] = layer
  return key, array


def read(path: str) -> list[dict[str, Any]]:
  """`stream` as a list."""
  return list(stream(path))


def _read_lines(
  path: str, check: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[bytes, dict[str, Any]]]:
  if not os.path.exists(path):
    return
  with files.open_file(path) as lines:
    for number, line in enumerate(lines, 1):
      if line.endswith(b'\n'):
        yield line, _parse_row(line, path, number, check)


def _parse_row(
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


# Values of a site: a number, [l], or [l][e]. Non-finite numbers are null.
_NUMBER = (float, None)
_SITE_VALUE = (float, None, [_NUMBER], [[_NUMBER]])
_SITE = {f'{share}?': ([[_NUMBER]], [_NUMBER]) for share in SHARES}
_SITE |= {'entropy': (*_NUMBER, [_NUMBER])}


def _check_metrics(row: dict[str, Any]) -> None:
  """
  Raises:
    Malformed: a metric is not a number, or the layers of a site differ in
      their number of values.
  """
  for key, value in row.items():
    # Rows of other versions may have booleans.
    if key != 'routing' and not isinstance(value, bool):
      untrusted.check_shape(value, (float, None), key)
  untrusted.check_shape(row, {'routing?': {str: _SITE}})
  for site, values in row.get('routing', {}).items():
    _check_site(values, f'routing.{site}')


def _check_site(values: Mapping[str, Any], where: str) -> None:
  if not any(share in values for share in SHARES):
    raise untrusted.Malformed(f'{where!r} has no share of experts')
  for key, value in values.items():
    untrusted.check_shape(value, _SITE_VALUE, f'{where}.{key}')
    if isinstance(value, list) and len({*map(_length, value)}) != 1:
      raise untrusted.Malformed(
        f'expected layers of as many figures each in {where + "." + key!r}'
      )


def _length(value: Any) -> int:
  return len(value) if isinstance(value, list) else -1


def _drop_after(path: str, step: int) -> None:
  """Truncates a file, whose steps ascend, after the last row of `step`.

  Truncation is atomic and, unlike a copy, needs no disk space.
  """
  if not os.path.exists(path):
    return
  end = 0
  for line, row in _read_lines(path, lambda row: None):
    if row['step'] > step:
      break
    end += len(line)
  os.truncate(path, end)


def is_number(value: object) -> bool:
  """Whether a value of a row is a finite number."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _replace_nonfinite(value: Any) -> Any:
  """Replaces NaN and infinities, which JSON lacks, by None."""
  if isinstance(value, Mapping):
    return {key: _replace_nonfinite(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_replace_nonfinite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
