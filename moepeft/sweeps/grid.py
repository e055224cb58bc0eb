# SPDX-License-Identifier: Apache-2.0
r"""Parses a grid: 'method=lora(rank=4)|molora(experts=2); seed=0..4'.

  grid    key=values; key=values; ...    a line break is a semicolon too
  values  value, value, ...              or, where commas are part of them,
          value | value | ...
  value   0..4                           the whole numbers 0, 1, 2, 3 and 4
          'a, b'                         a text in quotes, which are removed
          anything else                  a text

Separators in brackets or quotes separate nothing, so a method is written as it
is elsewhere. A line of a file that begins with # is a comment.
"""

import os
import re
import runpy
from collections.abc import Mapping, Sequence

from moepeft.core import files
from moepeft.core.ranges import short_repr

_RANGE = re.compile(r'(-?\d+)\.\.(-?\d+)')
_MAX_VALUES = 10_000
_BRACKETS = {'(': 1, '[': 1, '{': 1, ')': -1, ']': -1, '}': -1}


def of_flags(text: str, config_file: str) -> dict[str, tuple[str, ...]]:
  """The grid of --grid, or of the config file where that is empty.

  Raises:
    ValueError: as `read` or `of_config`.
  """
  return read(text) if text else of_config(config_file)


def read(text: str) -> dict[str, tuple[str, ...]]:
  """Parses a grid, or the file that has it.

  Args:
    text: a grid; a text without '=' is the path of a file.

  Raises:
    ValueError: the file does not exist, or as `parse`.
  """
  if '=' in text:
    return parse(text)
  path = os.path.expanduser(text.strip())
  if not os.path.isfile(path):
    raise ValueError(
      f'--grid={text} is no grid and no file; write it like '
      "--grid='method=lora|molora; seed=0..4'"
    )
  try:
    lines = files.read_text(path).splitlines()
  except UnicodeDecodeError:
    raise ValueError(f'--grid={text} is no text file') from None
  return parse('\n'.join(x for x in lines if not x.lstrip().startswith('#')))


def of_config(path: str) -> dict[str, tuple[str, ...]]:
  """The grid of a config file: GRID = {'seed': range(5), ...}.

  Args:
    path: a file of Python; '' for none.

  Raises:
    ValueError: the file has no grid, or one of another form.
  """
  variables = runpy.run_path(path) if path else {}
  if 'GRID' not in variables:
    raise ValueError(
      "--grid is missing: write it like --grid='method=lora|molora; seed=0..4',"
      ' or name a config that has a GRID, as those in configs/ablate have'
    )
  grid = variables['GRID']
  is_grid = isinstance(grid, Mapping) and all(
    isinstance(key, str)
    and isinstance(values, Sequence)
    and not isinstance(values, str)
    and len(values)
    for key, values in grid.items()
  )
  if not is_grid or not grid:
    raise ValueError(
      f"{path}: GRID = {short_repr(grid)} is no grid; write it like {{'seed': "
      "range(5), 'method': ['lora', 'molora']}"
    )
  return {key: tuple(map(str, values)) for key, values in grid.items()}


def parse(text: str) -> dict[str, tuple[str, ...]]:
  """Parses a grid into {key: texts of its values}, in the order of the text.

  Raises:
    ValueError: the text has another syntax, or a key or a value stands twice.
  """
  grid: dict[str, tuple[str, ...]] = {}
  for part in _split(text, ';\n'):
    if not part.strip():
      continue
    key, equals, values = part.partition('=')
    key = key.strip().removeprefix('--').removeprefix('config.')
    if not equals or not re.fullmatch(r'[\w.-]+', key):
      raise ValueError(
        f'--grid: {short_repr(part.strip())} is no key with values; write it '
        'like seed=0,1,2'
      )
    if key in grid:
      raise ValueError(f'--grid has {key} twice; write all its values in one')
    grid[key] = _values(key, values)
  if not grid:
    raise ValueError('--grid has no keys; write it like seed=0..4')
  return grid


def _values(key: str, text: str) -> tuple[str, ...]:
  parts = _split(text, '|')
  if len(parts) == 1:
    parts = _split(text, ',')
  values: list[str] = []
  for part in map(str.strip, parts):
    if not part:
      raise ValueError(
        f"--grid: {key} has an empty value; drop it, or write '' for an empty "
        'text'
      )
    values += _expand(key, part)
  if len(values) > _MAX_VALUES:
    raise ValueError(
      f'--grid: {key} has {len(values):,} values; expected {_MAX_VALUES:,} at '
      'most'
    )
  return tuple(values)


def _expand(key: str, text: str) -> list[str]:
  """The texts of a value: those of a range, or one without its quotes."""
  if match := _RANGE.fullmatch(text):
    first, last = map(int, match.groups())
    if first > last:
      raise ValueError(
        f'--grid: the range {key}={text} is empty; write {last}..{first}'
      )
    if last - first >= _MAX_VALUES:
      raise ValueError(
        f'--grid: the range {key}={text} has more than {_MAX_VALUES:,} values'
      )
    return [str(number) for number in range(first, last + 1)]
  is_quoted = text[0] in '\'"' and text.find(text[0], 1) == len(text) - 1
  return [text[1:-1] if is_quoted else text]


def _split(text: str, separators: str) -> list[str]:
  """Splits at separators outside of brackets and quotes.

  Raises:
    ValueError: a bracket or quote is not closed, or not opened.
  """
  parts, depth, quote = [''], 0, ''
  for char in text:
    if quote:
      quote = '' if char == quote else quote
    elif char in '\'"':
      quote = char
    else:
      depth += _BRACKETS.get(char, 0)
      if depth < 0:
        break
      if not depth and char in separators:
        parts.append('')
        continue
    parts[-1] += char
  if quote or depth:
    fault = f'quote {quote}' if quote else 'bracket'
    raise ValueError(
      f'--grid: a {fault} in {short_repr(parts[-1].strip())} has no partner'
    )
  return parts
