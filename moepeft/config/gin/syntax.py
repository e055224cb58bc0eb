# SPDX-License-Identifier: Apache-2.0
"""Reads gin files as T5X's users stack them; syntax only.

gin-config's parser does the reading, without its registry: the classes that
such files bind (t5x.utils.SaveCheckpointConfig, ...) need not exist. What the
names mean is said in `names` and `translate`.
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
  """%NAME, the value that NAME has when all files are read."""

  name: str

  def __repr__(self) -> str:
    return f'%{self.name}'


@dataclasses.dataclass(frozen=True)
class Reference:
  """@scope/module.Class, or a call of it with () behind."""

  name: str
  is_call: bool

  def __repr__(self) -> str:
    return f'@{self.name}{"()" if self.is_call else ""}'

  @property
  def last(self) -> str:
    """'Class' of '@scope/module.Class()'."""
    return self.name.split('/')[-1].split('.')[-1]


@dataclasses.dataclass(frozen=True)
class Assignment:
  """A value as it was written, and where."""

  value: Any
  where: str


@dataclasses.dataclass(frozen=True)
class Statements:
  """The bindings of stacked files and overrides.

  Attributes:
    values: by 'NAME' or 'scope/module.Class.argument', the last of each, in
      the order in which they were given.
    imports: the modules that are imported, with where.
  """

  values: Mapping[str, Assignment]
  imports: Mapping[str, str]

  def resolve(self, key: str) -> Any:
    """A value with the macros in it replaced.

    Raises:
      ValueError: a macro is defined nowhere, or by itself.
    """
    assigned = self.values[key]
    return self._resolve(assigned.value, assigned.where, (key,))

  def used(self) -> set[str]:
    """The macros that some value refers to."""
    macro_names: set[str] = set()
    for assigned in self.values.values():
      macro_names |= {leaf.name for leaf in _leaves(assigned.value)}
    return macro_names

  def text(self) -> str:
    """The same as one gin file, every name once."""
    lines = [f'import {module}' for module in self.imports]
    lines += [
      f'{key} = {assigned.value!r}' for key, assigned in self.values.items()
    ]
    return '\n'.join(lines) + '\n'

  def _resolve(self, value: Any, where: str, path: tuple[str, ...]) -> Any:
    if isinstance(value, Macro):
      name = value.name
      if name == REQUIRED:
        raise ValueError(
          f'{path[-1]} is required ({where}): give it with '
          f'--gin.{path[-1]}=VALUE'
        )
      if name in path:
        raise ValueError(f'%{name} is defined by itself ({where})')
      if name not in self.values:
        raise ValueError(f'%{name} is defined nowhere ({where} refers to it)')
      assigned = self.values[name]
      return self._resolve(assigned.value, assigned.where, (*path, name))
    if isinstance(value, dict):
      return {k: self._resolve(v, where, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return type(value)(self._resolve(v, where, path) for v in value)
    return value


def read(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  folders: Sequence[str] = (),
) -> Statements:
  """Reads files in order, then bindings; what comes later counts.

  Args:
    files: paths, as they are or below one of `folders`.
    bindings: 'NAME=value', as after --gin. on a command line.
    folders: where files, and those that they include, are looked for.

  Raises:
    ValueError: a file is absent, includes itself, or something is not gin.
  """
  values: dict[str, Assignment] = {}
  imports: dict[str, str] = {}
  statements = [s for file in files for s in _file(file, folders, ())]
  for binding in bindings:
    statements += _parse(binding, f'--gin.{binding}', folders, ())
  for key, assigned in statements:
    if key is None:
      imports.setdefault(assigned.value, assigned.where)
      continue
    # Put last: of two names for one thing the later counts.
    values.pop(key, None)
    values[key] = assigned
  return Statements(values, imports)


class _Delegate(config_parser.ParserDelegate):
  """Keeps references as they are written."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return Reference(scoped_configurable_name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def _file(
  path: str, folders: Sequence[str], above: tuple[str, ...]
) -> list[tuple[str | None, Assignment]]:
  beside = [os.path.dirname(file) for file in above[-1:]]
  # Files that lie together go together, wherever they are started from.
  paths = [os.path.join(f, path) for f in (*beside, '', *folders)]
  paths = [p for p in paths if os.path.isfile(p)]
  if not paths:
    by = f' (included by {above[-1]})' if above else ''
    raise ValueError(
      f'the gin file {path!r}{by} does not exist, here, in the package or in '
      'a folder of --gin_search_paths'
    )
  file = os.path.normpath(paths[0])
  if os.path.abspath(file) in map(os.path.abspath, above):
    raise ValueError(f'{file} includes itself, through {above[-1]}')
  with open(file, encoding='utf-8') as f:
    return list(_parse(f.read(), file, folders, (*above, file)))


def _parse(
  text: str, where: str, folders: Sequence[str], above: tuple[str, ...]
) -> Iterator[tuple[str | None, Assignment]]:
  """('NAME' or 'Class.argument', value) of a text; None for imports."""
  for statement in _statements(text, where):
    at = f'{where}:{statement.location.line_num}' if above else where
    if isinstance(statement, config_parser.IncludeStatement):
      yield from _file(statement.filename, folders, above)
    elif isinstance(statement, config_parser.ImportStatement):
      yield None, Assignment(statement.module, at)
    elif isinstance(statement, config_parser.BindingStatement):
      scope = f'{statement.scope}/' if statement.scope else ''
      argument = f'.{statement.arg_name}' if statement.arg_name else ''
      key = f'{scope}{statement.selector}{argument}'
      yield key, Assignment(statement.value, at)


def _statements(text: str, where: str) -> list[Any]:
  try:
    return list(config_parser.ConfigParser(io.StringIO(text), _Delegate()))
  # The tokenizer raises its own on an open bracket or quote.
  except Exception as error:
    # Without the place of an object in memory.
    reason = (str(error).splitlines() or ['cut short'])[0].split(': <')[0]
    line = getattr(error, 'lineno', None)
    at = f', line {line}' if line and not where.startswith('--') else ''
    quote = ' (strings are quoted: --gin.NAME=\'"text"\')'
    advice = quote if where.startswith('--') else ''
    raise ValueError(f'{where}{at} is not gin: {reason}{advice}') from None


def _leaves(value: Any) -> Iterator[Macro]:
  if isinstance(value, Macro):
    yield value
  elif isinstance(value, dict):
    for item in value.values():
      yield from _leaves(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _leaves(item)
