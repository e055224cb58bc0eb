# SPDX-License-Identifier: Apache-2.0
"""JSON and YAML from files, requests and model servers, read within limits.

`json.loads` raises RecursionError on deep nesting, accepts half of a surrogate
pair, which no tokenizer and no terminal can encode, and says nothing of types.
Whatever moepeft did not write itself a moment ago is read here; every fault is
a `Malformed`, a ValueError whose message is one sentence.
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

# Nesting beyond which a text is refused. Configs, schemas and tool calls of
# real use stay under 30 levels.
MAX_DEPTH = 100
# Nodes that a YAML text may have after its aliases are expanded.
_MAX_NODES = 1_000_000
# Characters of a literal.
_MAX_LITERAL = 10_000
# Integers of JSON have no bound, arrays of NumPy and JAX do.
_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')
_REQUIRED = object()
_NAMES = {
  bool: 'true or false',
  dict: 'an object',
  float: 'a number',
  int: 'an integer',
  list: 'a list',
  str: 'a text',
}


class Malformed(ValueError):
  """A text is not JSON or YAML, or a value in it is not of its type."""


def parse_json(
  text: str | bytes,
  max_depth: int = MAX_DEPTH,
  allow_nan: bool = True,
  check_text: bool = True,
  unique_keys: bool = False,
) -> Any:
  """The value of a JSON text.

  Args:
    text: UTF-8 where it is bytes; a byte order mark at its start is ignored.
    max_depth: levels of lists and objects.
    allow_nan: whether NaN and Infinity, which Python writes, are numbers.
    check_text: whether strings are looked at for halves of surrogate pairs;
      False where the caller does so and names the field.
    unique_keys: whether an object may have a key once alone; else the last of
      its values counts, as elsewhere in Python.

  Raises:
    Malformed: not JSON, nested too deeply, or a string holds half a surrogate
      pair. The message has no name of a source: 'not JSON (...)'.
  """
  options = {} if allow_nan else {'parse_constant': _refuse_constant}
  if unique_keys:
    options['object_pairs_hook'] = _object_of
  try:
    if isinstance(text, bytes):
      text = text.decode('utf-8-sig')
    value = json.loads(text.removeprefix('\ufeff'), **options)
  except UnicodeDecodeError:
    raise Malformed('not UTF-8') from None
  except json.JSONDecodeError as error:
    where = f'line {error.lineno}, column {error.colno}'
    raise Malformed(f'not JSON ({error.msg}: {where})') from None
  except RecursionError:
    raise Malformed(_too_deep(max_depth)) from None
  except ValueError as error:  # an integer of more than 4,300 digits; NaN
    raise Malformed(f'not JSON ({str(error).partition(";")[0]})') from None
  # Most texts have fewer brackets in all than levels are allowed.
  if text.count('[') + text.count('{') > max_depth:
    _check_depth(value, max_depth)
  if check_text and _SURROGATE.search(text):
    check_encodable(value)
  return value


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader):
  """The value of a YAML text; raises Malformed as `parse_json` does.

  Args:
    loader: a safe loader, which makes plain values only.
  """
  try:
    value = yaml.load(text.removeprefix('\ufeff'), loader)  # noqa: S506
  except yaml.YAMLError as error:
    raise Malformed(f'not YAML ({" ".join(str(error).split())})') from None
  except RecursionError:
    raise Malformed(_too_deep(MAX_DEPTH)) from None
  except (ValueError, TypeError) as error:
    # A date of month 13; a list as a mapping's key.
    raise Malformed(f'not YAML ({error})') from None
  _check_depth(value, MAX_DEPTH, _MAX_NODES)
  check_encodable(value)
  return value


def parse_literal(text: str) -> Any:
  """The value of a Python literal, such as a command line has.

  Raises:
    Malformed: it is no literal, or is longer than 10,000 characters.
  """
  try:
    if len(text) > _MAX_LITERAL:
      raise ValueError
    return ast.literal_eval(text.strip())
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
    # A MemoryError is how the parser refuses a text that is nested too deeply.
    raise Malformed('no literal of Python') from None


def read_json(path: str | os.PathLike) -> Any:
  """The value of a JSON file.

  Raises:
    Malformed: as `parse_json`, and the message names the file.
    OSError: the file cannot be opened, or is no regular file.
  """
  raw = files.read_bytes(path)
  try:
    return parse_json(raw)
  except Malformed as error:
    raise Malformed(f'{os.fspath(path)} is {error}; copy it again') from None


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
  """The object of a JSON file; raises as `read_json`."""
  value = read_json(path)
  if not isinstance(value, dict):
    raise Malformed(
      f'{os.fspath(path)} holds {_name_of(value)}, expected a JSON object'
    )
  return value


def field(
  source: Any, key: str, kind: type[Kind], default: Any = _REQUIRED
) -> Kind:
  """A field of a parsed object, of the type that is expected.

  Args:
    source: the object, or whatever stands in its place.
    key: the field's name; 'message.content' goes down two levels.
    kind: bool, int (of 64 bits), float (integers too), str, list or dict.
    default: the value where the field is absent or null; without a default
      such a field is an error.

  Raises:
    Malformed: 'expected an integer in 'n', got a text'.
  """
  *parents, name = key.split('.')
  absent = _REQUIRED if default is _REQUIRED else {}
  for parent in parents:
    source = field(source, parent, dict, absent)
  if not isinstance(source, Mapping):
    raise Malformed(f'expected an object with {key!r}, got {_name_of(source)}')
  value = source.get(name)
  if value is None:
    if default is _REQUIRED:
      raise Malformed(f'expected {_NAMES[kind]} in {key!r}, got none')
    return default
  if not _is(value, kind):
    raise Malformed(
      f'expected {_NAMES[kind]} in {key!r}, got {_name_of(value)}'
    )
  if kind in (int, float) and not _MIN_INT <= value <= _MAX_INT:
    if isinstance(value, int):
      raise Malformed(f'expected 64 bits in {key!r}, got a larger integer')
  return float(value) if kind is float else value


def check_shape(
  value: Any, shape: Any, path: str = '', finite: bool = True
) -> None:
  """Compares a parsed value with the shape that its reader expects.

  Args:
    shape: a type (float takes integers, and only finite numbers); None for
      null; a tuple of alternatives; [shape] for a list; {str: shape} for an
      object of any keys; {'key': shape} for an object that has the keys,
      those that end in '?' if need be, and whatever else.
    path: where the value lies, for the message.
    finite: whether numbers have to be.

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
    beginning = path and f'{path}.'
    for key, inner in shape.items():
      if key is str:
        for name, item in value.items():
          check_shape(item, inner, f'{beginning}{name}', finite)
        continue
      name = key.removesuffix('?')
      if name in value:
        check_shape(value[name], inner, f'{beginning}{name}', finite)
      elif name == key:
        raise Malformed(f'{beginning + name!r} is absent')
  elif shape is None:
    if value is not None:
      raise Malformed(f'expected null{_at(path)}, got {_name_of(value)}')
  else:
    _check_kind(value, shape, path)
    if shape in (int, float) and not _MIN_INT <= value <= _MAX_INT:
      if isinstance(value, int):
        raise Malformed(f'expected 64 bits{_at(path)}, got a larger integer')
      if finite and not math.isfinite(value):
        raise Malformed(f'expected a finite number{_at(path)}, got {value}')


def _check_kind(value: Any, kind: type, path: str) -> None:
  if not _is(value, kind):
    raise Malformed(
      f'expected {_NAMES[kind]}{_at(path)}, got {_name_of(value)}'
    )


def _at(path: str) -> str:
  return f' in {path!r}' if path else ''


def check_encodable(value: Any) -> None:
  """
  Raises:
    Malformed: a string in the value, or a key, holds half a surrogate pair.
  """
  for node, _ in _walk(value):
    if isinstance(node, str):
      try:
        node.encode('utf-8')
      except UnicodeEncodeError:
        raise Malformed(
          'not text (half a surrogate pair in a string, which has no UTF-8)'
        ) from None


def _is(value: Any, kind: type) -> bool:
  if kind is float:
    kind = (int, float)
  return isinstance(value, kind) and (
    kind is bool or not isinstance(value, bool)
  )


def _name_of(value: Any) -> str:
  if value is None:
    return 'null'
  for kind, name in _NAMES.items():
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
  """(node, level) of a value, from 1, and of all in it, keys included."""
  stack = [(value, 1)]
  while stack:
    node, depth = stack.pop()
    yield node, depth
    if isinstance(node, dict):
      stack.extend((key, depth + 1) for key in node)
      stack.extend((child, depth + 1) for child in node.values())
    elif isinstance(node, list):
      stack.extend((child, depth + 1) for child in node)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in value if keys.count(key) > 1)
    raise ValueError(f'an object has the key {twice!a} twice')
  return value


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is no number of JSON')


def _too_deep(max_depth: int) -> str:
  return f'nested too deeply (more than {max_depth} levels)'
