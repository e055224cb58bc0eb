# SPDX-License-Identifier: Apache-2.0
"""Parses JSON and YAML from files, requests and model servers, within limits.

`json.loads` raises RecursionError on deep nesting, accepts half of a surrogate
pair, which no tokenizer and no terminal can encode, and checks no types. All
JSON and YAML from outside the process is parsed here. Every fault is a
`Malformed`, a ValueError whose message is one sentence.
"""

import ast
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from moepeft.core import files

Kind = TypeVar('Kind')

# The maximum nesting. Configs, schemas and tool calls in practice have fewer
# than 30 levels.
MAX_DEPTH = 100
# The maximum number of nodes in a YAML text after its aliases are expanded.
_MAX_NODES = 1_000_000
# In characters.
_MAX_LITERAL = 10_000
# JSON's integers have no bound, but NumPy's and JAX's arrays do.
_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')
_REQUIRED = object()
_TYPE_NAMES = {
  bool: 'true or false',
  dict: 'an object',
  float: 'a number',
  int: 'an integer',
  list: 'a list',
  str: 'a text',
}


class Malformed(ValueError):
  """A text is not JSON or YAML, or a value in it has the wrong type."""


def parse_json(
  text: str | bytes,
  max_depth: int = MAX_DEPTH,
  allow_nan: bool = True,
  check_text: bool = True,
  unique_keys: bool = False,
) -> Any:
  """Parses a JSON text.

  Args:
    text: bytes are UTF-8; a byte order mark at the start is ignored.
    max_depth: the maximum nesting of lists and objects.
    allow_nan: whether NaN and Infinity, which Python writes, are numbers.
    check_text: whether to check strings for halves of surrogate pairs; False
      if the caller does so and names the field.
    unique_keys: whether a repeated key in an object is an error; else the last
      value counts, as in `json.loads`.

  Raises:
    Malformed: the text is not JSON, is nested too deeply, or has half a
      surrogate pair. The message does not name the source: 'not JSON (...)'.
  """
  options = {} if allow_nan else {'parse_constant': _refuse_constant}
  if unique_keys:
    options['object_pairs_hook'] = _unique_object
  try:
    if isinstance(text, bytes):
      text = text.decode('utf-8-sig')
    value = json.loads(text.removeprefix('\ufeff'), **options)
  except UnicodeDecodeError:
    raise Malformed('not UTF-8') from None
  except json.JSONDecodeError as error:
    location = f'line {error.lineno}, column {error.colno}'
    raise Malformed(f'not JSON ({error.msg}: {location})') from None
  except RecursionError:
    raise Malformed(_too_deep(max_depth)) from None
  except ValueError as error:  # an integer of more than 4,300 digits; NaN
    raise Malformed(f'not JSON ({str(error).partition(";")[0]})') from None
  # Most texts have fewer brackets than the maximum depth.
  if text.count('[') + text.count('{') > max_depth:
    _check_depth(value, max_depth)
  if check_text and _SURROGATE.search(text):
    check_encodable(value)
  return value


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader):
  """Parses a YAML text; raises Malformed as `parse_json` does.

  Args:
    loader: a safe loader, which constructs plain values only.
  """
  try:
    value = yaml.load(text.removeprefix('\ufeff'), loader)  # noqa: S506
  except yaml.YAMLError as error:
    raise Malformed(f'not YAML ({" ".join(str(error).split())})') from None
  except RecursionError:
    raise Malformed(_too_deep(MAX_DEPTH)) from None
  except (ValueError, TypeError) as error:
    # For example a date with month 13, or a list as a mapping's key.
    raise Malformed(f'not YAML ({error})') from None
  _check_depth(value, MAX_DEPTH, _MAX_NODES)
  check_encodable(value)
  return value


def parse_literal(text: str) -> Any:
  """Parses a Python literal, for example from a command line.

  Raises:
    Malformed: the text is no literal, or is longer than 10,000 characters.
  """
  try:
    if len(text) > _MAX_LITERAL:
      raise ValueError
    return ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
    # The parser raises MemoryError if a text is nested too deeply.
    raise Malformed('no literal of Python') from None


def read_json(path: str | os.PathLike) -> Any:
  """Parses a JSON file.

  Raises:
    Malformed: as `parse_json`; the message names the file.
    OSError: the file cannot be opened, or is no regular file.
  """
  raw = files.read_bytes(path)
  try:
    return parse_json(raw)
  except Malformed as error:
    raise Malformed(f'{os.fspath(path)} is {error}; copy it again') from None


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
  """Parses a JSON file with an object; raises as `read_json`."""
  value = read_json(path)
  if not isinstance(value, dict):
    raise Malformed(
      f'{os.fspath(path)} has {_type_name(value)}, expected a JSON object'
    )
  return value


def field(
  source: Any, key: str, kind: type[Kind], default: Any = _REQUIRED
) -> Kind:
  """Returns a field of a parsed object, and checks its type.

  Args:
    source: the object; any other value is an error.
    key: the field's name; 'message.content' is a field of a field.
    kind: bool, int (64 bits), float (integers too), str, list or dict.
    default: the value if the field is absent or null; without a default, such
      a field is an error.

  Raises:
    Malformed: 'expected an integer in 'n', got a text'.
  """
  *parents, name = key.split('.')
  parent_default = _REQUIRED if default is _REQUIRED else {}
  for parent in parents:
    source = field(source, parent, dict, parent_default)
  if not isinstance(source, Mapping):
    raise Malformed(
      f'expected an object with {key!r}, got {_type_name(source)}'
    )
  value = source.get(name)
  if value is None:
    if default is _REQUIRED:
      raise Malformed(f'expected {_TYPE_NAMES[kind]} in {key!r}, got none')
    return default
  if not _has_type(value, kind):
    raise Malformed(
      f'expected {_TYPE_NAMES[kind]} in {key!r}, got {_type_name(value)}'
    )
  if kind in (int, float) and not _MIN_INT <= value <= _MAX_INT:
    if isinstance(value, int):
      raise Malformed(f'expected 64 bits in {key!r}, got a larger integer')
  return float(value) if kind is float else value


def check_shape(
  value: Any, shape: Any, path: str = '', finite: bool = True
) -> None:
  """Checks a parsed value against the shape that the caller expects.

  Args:
    shape: a type (float allows integers, and finite numbers only); None for
      null; a tuple of alternatives; [shape] for a list; {str: shape} for an
      object with any keys; {'key': shape} for an object with at least these
      keys, where a key that ends in '?' is optional.
    path: the path of the value, for the message.
    finite: whether numbers must be finite.

  Raises:
    Malformed: "expected a number in 'rows[2].accuracy', got a text".
  """
  if isinstance(shape, tuple):
    errors = []
    for alternative in shape:
      try:
        return check_shape(value, alternative, path, finite)
      except Malformed as error:
        errors.append(error)
    raise errors[0]
  if isinstance(shape, list):
    _check_kind(value, list, path)
    for i, item in enumerate(value):
      check_shape(item, shape[0], f'{path}[{i}]', finite)
  elif isinstance(shape, dict):
    _check_kind(value, dict, path)
    prefix = path and f'{path}.'
    for key, inner in shape.items():
      if key is str:
        for name, item in value.items():
          check_shape(item, inner, f'{prefix}{name}', finite)
        continue
      name = key.removesuffix('?')
      if name in value:
        check_shape(value[name], inner, f'{prefix}{name}', finite)
      elif name == key:
        raise Malformed(f'{prefix + name!r} is absent')
  elif shape is None:
    if value is not None:
      raise Malformed(f'expected null{_at(path)}, got {_type_name(value)}')
  else:
    _check_kind(value, shape, path)
    if shape in (int, float) and not _MIN_INT <= value <= _MAX_INT:
      if isinstance(value, int):
        raise Malformed(f'expected 64 bits{_at(path)}, got a larger integer')
      if finite and not math.isfinite(value):
        raise Malformed(f'expected a finite number{_at(path)}, got {value}')


def _check_kind(value: Any, kind: type, path: str) -> None:
  if not _has_type(value, kind):
    raise Malformed(
      f'expected {_TYPE_NAMES[kind]}{_at(path)}, got {_type_name(value)}'
    )


def _at(path: str) -> str:
  return f' in {path!r}' if path else ''


def check_encodable(value: Any) -> None:
  """
  Raises:
    Malformed: a string in the value, or a key, has half a surrogate pair.
  """
  for node, _ in _walk(value):
    if isinstance(node, str):
      try:
        node.encode('utf-8')
      except UnicodeEncodeError:
        raise Malformed(
          'not text (half a surrogate pair in a string, which has no UTF-8)'
        ) from None


def _has_type(value: Any, kind: type) -> bool:
  if kind is float:
    kind = (int, float)
  return isinstance(value, kind) and (
    kind is bool or not isinstance(value, bool)
  )


def _type_name(value: Any) -> str:
  if value is None:
    return 'null'
  for kind, name in _TYPE_NAMES.items():
    if isinstance(value, kind):
      return name
  return type(value).__name__


def _check_depth(
  value: Any, max_depth: int, max_nodes: float = math.inf
) -> None:
  for count, (node, depth) in enumerate(_walk(value)):
    if depth > max_depth and isinstance(node, (dict, list)):
      raise Malformed(_too_deep(max_depth))
    if count > max_nodes:
      raise Malformed(f'too large (more than {max_nodes:,} nodes)')


def _walk(value: Any):
  """Yields (node, depth) of a value and all that it contains, with the keys."""
  stack = [(value, 1)]
  while stack:
    node, depth = stack.pop()
    yield node, depth
    if isinstance(node, dict):
      stack.extend((key, depth + 1) for key in node)
      stack.extend((child, depth + 1) for child in node.values())
    elif isinstance(node, list):
      stack.extend((child, depth + 1) for child in node)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    duplicate = next(key for key in value if keys.count(key) > 1)
    raise ValueError(f'an object has the key {duplicate!a} twice')
  return value


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is no number of JSON')


def _too_deep(max_depth: int) -> str:
  return f'nested too deeply (more than {max_depth} levels)'
