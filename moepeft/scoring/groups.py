# SPDX-License-Identifier: Apache-2.0
"""Runs that differ by their seed become one row, with a label of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moepeft.scoring.folders import Entry


@dataclasses.dataclass(frozen=True)
class Group:
  """A row of a table.

  Attributes:
    entries: one a seed, in the order of the command line.
    aside: what tells it from rows of the same method.
  """

  entries: tuple[Entry, ...]
  aside: str = ''

  @property
  def first(self) -> Entry:
    return self.entries[0]


def group(entries: Sequence[Entry]) -> list[Group]:
  """Rows in the order of their first entry, labels told apart.

  A base that several runs have evaluated is one entry.

  Raises:
    ValueError: a run is given twice, or two runs differ in nothing, not even
      in their seed.
  """
  found = {}
  for entry in entries:
    own = found.setdefault(_key(entry), [])
    if entry.is_base and own:
      continue
    for other in own:
      if other.seed == entry.seed:
        raise ValueError(_twice(other, entry))
    own.append(entry)
  rows = [tuple(own) for own in found.values()]
  return [Group(own, _aside(own[0], rows)) for own in rows]


def differing(entries: Sequence[Entry]) -> list[str]:
  """Settings in which entries differ, their budget left out."""
  keys = sorted({key for entry in entries for key in entry.settings})
  return [
    key
    for key in keys
    if key not in ('steps', 'batch_size')
    and len({repr(entry.settings.get(key)) for entry in entries}) > 1
  ]


def _key(entry: Entry) -> tuple:
  if entry.is_base:
    return entry.method, entry.base
  settings = tuple(sorted((k, repr(v)) for k, v in entry.settings.items()))
  return entry.method, entry.semantics, entry.base, entry.step, settings


def _twice(one: Entry, other: Entry) -> str:
  if one.folder == other.folder:
    return f'{one.folder!r} is given twice; name it once'
  return (
    f'{one.folder!r} and {other.folder!r} are one method with the same '
    f'settings and seed {one.seed}: they are no two seeds; leave one out'
  )


def _aside(entry: Entry, rows: Sequence[tuple[Entry, ...]]) -> str:
  """What tells a row apart: base and semantics where any row's differ."""
  firsts = [own[0] for own in rows]
  trained = [e for e in firsts if not e.is_base]
  words = []
  if len({e.base for e in firsts}) > 1:
    words.append(f'on {entry.base}')
  if entry.is_base:
    return ', '.join(['the base', *words])
  if len({e.semantics for e in trained}) > 1:
    words.append(entry.semantics)
  alike = [
    e
    for e in trained
    if (e.method, e.semantics, e.base)
    == (entry.method, entry.semantics, entry.base)
  ]
  if len({e.step for e in alike}) > 1:
    words.append(f'step {entry.step:,}')
  keys = [*differing(alike), *_budget(alike)]
  words += [f'{key}={shown(entry.settings.get(key))}' for key in keys]
  return ', '.join(words)


def _budget(entries: Sequence[Entry]) -> list[str]:
  found = []
  for key in ('batch_size', 'steps'):
    values = {entry.settings.get(key) for entry in entries}
    if len(values) > 1 and not (
      # The step has been said.
      key == 'steps' and len({e.step for e in entries}) == len(entries)
    ):
      found.append(key)
  return found


def shown(value: Any) -> str:
  return str(value) if isinstance(value, str) else repr(value)
