# SPDX-License-Identifier: Apache-2.0
"""One registry class for routers, methods, objectives, readers, metrics, ...

A registry maps names to entries. An entry is an implementation with the facts
that other code needs to know about it, so that no code branches on an entry's
name.

  # moepeft/moe/__init__.py
  ROUTERS = Registry(
    'router', 'moepeft.moe.routers', {'softmax': 'softmax:ROUTER'}
  )
  ROUTERS['softmax']                  # imports moepeft.moe.routers.softmax
  ROUTERS.register('mine', entry)     # from a user's module
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from moepeft.core.ranges import short_repr, suggestion


class Registry(Mapping[str, Any]):
  """Entries by name; a built-in entry's module is imported at first use.

  Attributes:
    kind: the noun for an entry in error messages, such as 'router'.
  """

  def __init__(self, kind: str, package: str, locations: Mapping[str, str]):
    """
    Args:
      package: the package that the modules of `locations` are in.
      locations: {name: 'module:ATTRIBUTE'}.
    """
    self.kind = kind
    self._package = package
    self._locations = dict(locations)
    self._entries: dict[str, Any] = {}

  def register(self, name: str, entry: Any) -> None:
    """Adds an entry.

    Raises:
      ValueError: another entry has the name.
    """
    if name in self and self[name] is not entry:
      raise ValueError(
        f'there is a {self.kind} {name!r} already; register yours under '
        'another name'
      )
    self._entries[name] = entry

  def lookup(self, name: str) -> Any:
    """Returns the entry with a name that a user wrote.

    Raises:
      ValueError: there is no such entry; the message lists the names.
    """
    if name not in self:
      raise ValueError(
        f'there is no {self.kind} {short_repr(name)}; there are '
        f'{", ".join(self)}{suggestion(name, self)}'
      )
    return self[name]

  def __getitem__(self, name: str) -> Any:
    if name not in self._entries:
      module, _, attribute = self._locations[name].partition(':')
      imported = importlib.import_module(f'{self._package}.{module}')
      self._entries[name] = getattr(imported, attribute)
    return self._entries[name]

  def __contains__(self, name: object) -> bool:
    return name in self._locations or name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._locations | self._entries)

  def __len__(self) -> int:
    return len(self._locations | self._entries)
