# SPDX-License-Identifier: Apache-2.0
"""Config files as data: written from a syntax tree, parsed without execution.

A config file is the Python file of `--config=`. A model's text becomes only
constants of the syntax tree, never code. A file that this module would not have
written is refused.
"""

import ast
import keyword
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

Constant = bool | int | float | str | None

_LICENSE = '# SPDX-License-Identifier: Apache-2.0\n'
_TEMPLATE = """
from moepeft import config as config_lib

def get_config(values: str=''):
  config_lib.values(values)
  c = config_lib.default()
  return c
"""
# A file name without directories that does not start with '-'.
_NAME = re.compile(r'[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}\.py')
_KEY = re.compile(r'[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*', re.ASCII)
# The maximum size of a config file in bytes; typical files have 2,000.
MAX_BYTES = 1 << 16


def check_name(name: str) -> None:
  """
  Raises:
    ValueError: it is not the name of a Python file without a directory.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(
      f'expected a file name like my_config.py, of letters, digits, - and _, '
      f'without a directory; got {name!r}'
    )


def render_config(docstring: str, values: Mapping[str, Constant]) -> str:
  """The text of a config file.

  Args:
    docstring: any text.
    values: {key: value}, for example of 'optimizer.learning_rate'.

  Raises:
    ValueError: a key or a value cannot be in a config file.
  """
  tree = ast.parse(_TEMPLATE)
  body = tree.body[-1].body
  for key, value in values.items():
    body.insert(-1, ast.Assign([_target(key)], _constant(key, value)))
  tree.body.insert(0, ast.Expr(ast.Constant(docstring)))
  return _LICENSE + ast.unparse(ast.fix_missing_locations(tree)) + '\n'


def _target(key: str) -> ast.expr:
  parts = key.split('.')
  if not _KEY.fullmatch(key) or any(map(keyword.iskeyword, parts)):
    raise ValueError(f'{key!r} is no key of a config')
  node: ast.expr = ast.Name('c', ast.Load())
  for part in parts[:-1]:
    node = ast.Attribute(node, part, ast.Load())
  return ast.Attribute(node, parts[-1], ast.Store())


def _constant(key: str, value: Constant) -> ast.expr:
  if type(value) not in (bool, int, float, str, type(None)):
    raise ValueError(
      f'{key} is a number, a string, True, False or None; got '
      f'{type(value).__name__}'
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f'{key} is a finite number; got {value}')
  return ast.parse(repr(value), mode='eval').body


def parse_config(text: str) -> dict[str, Constant]:
  """Parses the values that a config file sets, without executing it.

  Raises:
    ValueError: the text is not a result of `render_config`.
  """
  try:
    if len(text.encode()) > MAX_BYTES:
      raise ValueError('it is too long')
    tree = ast.parse(text)
    docstring = tree.body[0].value.value
    values = {}
    for node in tree.body[-1].body:
      if isinstance(node, ast.Assign):
        key = ast.unparse(node.targets[0])
        if key.startswith('c.'):
          values[key.removeprefix('c.')] = ast.literal_eval(node.value)
    if render_config(docstring, values) == text:
      return values
  # Arbitrary text; deep nesting exhausts the parser's stack or memory.
  except (
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
  ):
    pass
  raise ValueError(
    'the text is no config file: a docstring and get_config, which sets keys '
    'to constants and does nothing else'
  )


def save_config(data: bytes, folder: str | os.PathLike) -> str:
  """Writes the config file of a script into a directory; returns its name.

  Args:
    data: the file's name, a newline, and its text.
    folder: the directory; existing files and links are not overwritten.

  Raises:
    ValueError: it is not a config file, or the file exists.
  """
  if len(data) > MAX_BYTES:
    raise ValueError(f'a config file has at most {MAX_BYTES:,} bytes')
  try:
    name, _, text = data.decode().partition('\n')
  except UnicodeDecodeError:
    raise ValueError('a config file is UTF-8') from None
  check_name(name)
  parse_config(text)
  # Mode 'x' also fails if a link has that name.
  try:
    with open(Path(folder) / name, 'x', encoding='utf-8') as file:
      file.write(text)
  except FileExistsError:
    raise ValueError(f'{name} exists; choose another name') from None
  return name
