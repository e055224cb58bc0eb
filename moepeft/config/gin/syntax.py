# SPDX-License-Identifier: Apache-2.0
"""Parses stacked gin files, as T5X has them.

gin-config parses the text, without its registry, so the classes that the files
bind (t5x.utils.SaveCheckpointConfig, ...) need not exist. `names` and
`translate` interpret the result.
"""

import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser

REQUIRED = 'gin.REQUIRED'


@dataclasses.dataclass(frozen=True)
class Macro:
  """%NAME, the value of NAME after all files are read."""

  name: str

  def __repr__(self) -> str:
    return f'%{self.name}'


@dataclasses.dataclass(frozen=True)
class Reference:
  """@scope/module.Class, or its call, @scope/module.Class()."""

  name: str
  is_call: bool

  def __repr__(self) -> str:
    return f'@{self.name}{"()" if self.is_call else ""}'

  @property
  def class_name(self) -> str:
    """'@scope/module.Class()' -> 'Class'."""
    return self.name.split('/')[-1].split('.')[-1]


@dataclasses.dataclass(frozen=True)
class Assignment:
  """A parsed value, and its file and line or its flag."""

  value: Any
  location: str


@dataclasses.dataclass(frozen=True)
class Statements:
  """The bindings of stacked files and overrides.

  Attributes:
    values: the last assignment to each 'NAME' or
      'scope/module.Class.argument', in their order.
    imports: the location of each module's import.
  """

  values: Mapping[str, Assignment]
  imports: Mapping[str, str]

  def resolve(self, key: str) -> Any:
    """The value of a key, with its macros replaced.

    Raises:
      ValueError: a macro has no definition, or a circular one.
    """
    assignment = self.values[key]
    return self._resolve(assignment.value, assignment.location, (key,))

  def references(self) -> set[str]:
    """The names of the macros in all values."""
    return {
      macro.name
      for assignment in self.values.values()
      for macro in _macros(assignment.value)
    }

  def to_gin(self) -> str:
    """The statements as one gin file, with each name once."""
    lines = [f'import {module}' for module in self.imports]
    lines += [f'{key} = {a.value!r}' for key, a in self.values.items()]
    return '\n'.join(lines) + '\n'

  def _resolve(self, value: Any, location: str, path: tuple[str, ...]) -> Any:
    if isinstance(value, Macro):
      name = value.name
      if name == REQUIRED:
        raise ValueError(
          f'{path[-1]} is required ({location}): set it with '
          f'--gin.{path[-1]}=VALUE'
        )
      if name in path:
        raise ValueError(f'%{name} refers to itself ({location})')
      if name not in self.values:
        raise ValueError(f'%{name} is not defined ({location} refers to it)')
      assignment = self.values[name]
      return self._resolve(assignment.value, assignment.location, (*path, name))
    if isinstance(value, dict):
      return {k: self._resolve(v, location, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return type(value)(self._resolve(v, location, path) for v in value)
    return value


def read(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Statements:
  """Reads files in order, then bindings; a later value replaces an earlier one.

  Args:
    files: paths, from here or from one of `search_paths`.
    bindings: 'NAME=value', the text after --gin. on a command line.
    search_paths: directories of the files and of the files that they include.

  Raises:
    ValueError: a file is absent or includes itself, or a text is not gin.
  """
  values: dict[str, Assignment] = {}
  imports: dict[str, str] = {}
  statements = [s for file in files for s in _read_file(file, search_paths, ())]
  for binding in bindings:
    statements += _parse(binding, f'--gin.{binding}', search_paths, ())
  for key, assignment in statements:
    if key is None:
      imports.setdefault(assignment.value, assignment.location)
      continue
    # Moved to the end: if two names set the same value, the later one counts.
    values.pop(key, None)
    values[key] = assignment
  return Statements(values, imports)


class _Delegate(config_parser.ParserDelegate):
  """Represents references and macros by their names."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Reference(scoped_configurable_name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def _read_file(
  path: str, search_paths: Sequence[str], includers: tuple[str, ...]
) -> list[tuple[str | None, Assignment]]:
  # A file that another one includes is first searched for beside it.
  includer_folders = [os.path.dirname(file) for file in includers[-1:]]
  paths = [
    os.path.join(f, path) for f in (*includer_folders, '', *search_paths)
  ]
  paths = [p for p in paths if os.path.isfile(p)]
  if not paths:
    by = f' (included by {includers[-1]})' if includers else ''
    raise ValueError(
      f'the gin file {path!r}{by} does not exist, here, in the package or in '
      'a folder of --gin_search_paths'
    )
  file = os.path.normpath(paths[0])
  if os.path.abspath(file) in map(os.path.abspath, includers):
    raise ValueError(f'{file} includes itself, through {includers[-1]}')
  with open(file, encoding='utf-8') as f:
    return list(_parse(f.read(), file, search_paths, (*includers, file)))


def _parse(
  text: str,
  source: str,
  search_paths: Sequence[str],
  includers: tuple[str, ...],
) -> Iterator[tuple[str | None, Assignment]]:
  """Yields ('NAME' or 'Class.argument', value), or (None, imported module)."""
  for statement in _statements(text, source):
    is_file = bool(includers)
    location = f'{source}:{statement.location.line_num}' if is_file else source
    if isinstance(statement, config_parser.IncludeStatement):
      yield from _read_file(statement.filename, search_paths, includers)
    elif isinstance(statement, config_parser.ImportStatement):
      yield None, Assignment(statement.module, location)
    elif isinstance(statement, config_parser.BindingStatement):
      scope = f'{statement.scope}/' if statement.scope else ''
      argument = f'.{statement.arg_name}' if statement.arg_name else ''
      key = f'{scope}{statement.selector}{argument}'
      yield key, Assignment(statement.value, location)


def _statements(text: str, source: str) -> list[Any]:
  try:
    return list(config_parser.ConfigParser(io.StringIO(text), _Delegate()))
  # Python's tokenizer raises errors of several types.
  except Exception as error:
    # An address in memory may follow ': <'.
    reason = (str(error).splitlines() or ['unexpected end'])[0].split(': <')[0]
    if source.startswith('--'):
      source_line = source
      reason += ' (strings are quoted: --gin.NAME=\'"text"\')'
    else:
      line = getattr(error, 'lineno', None)
      source_line = f'{source}, line {line}' if line else source
    raise ValueError(f'{source_line} is not gin: {reason}') from None


def _macros(value: Any) -> Iterator[Macro]:
  if isinstance(value, Macro):
    yield value
  elif isinstance(value, dict):
    for item in value.values():
      yield from _macros(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _macros(item)
