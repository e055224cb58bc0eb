# SPDX-License-Identifier: Apache-2.0
"""Runs that differ by their seed become one row, with a label of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepeft.evaluation.results import Result
from moepeft.evaluation.tables.run_results import Entry

# Two evaluations of one base on other machines round otherwise.
_ROUNDING = 1e-4


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

  A base that several runs have evaluated is one entry with the rows of all.

  Raises:
    ValueError: a run is given twice, two runs differ in nothing, not even in
      their seed, or evaluations of one base contradict each other.
  """
  found = {}
  for entry in _sized(entries):
    own = found.setdefault(_key(entry), [])
    if entry.is_base and own:
      own[0] = _merged(own[0], entry)
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
  base = entry.base, entry.base_parameters
  if entry.is_base:
    return entry.method, base, entry.seed if _is_seeds(entry) else None
  settings = tuple(sorted((k, repr(v)) for k, v in entry.settings.items()))
  return entry.method, entry.semantics, base, entry.at, settings


def _sized(entries: Sequence[Entry]) -> list[Entry]:
  """A run without rows has the size that the base has elsewhere, if one."""
  sizes = {}
  for entry in entries:
    if entry.base_parameters is not None:
      sizes.setdefault(entry.base, set()).add(entry.base_parameters)
  return [
    dataclasses.replace(entry, base_parameters=min(sizes[entry.base]))
    if entry.base_parameters is None and len(sizes.get(entry.base, ())) == 1
    else entry
    for entry in entries
  ]


def _is_seeds(entry: Entry) -> bool:
  """Whether a base's rows depend on the seed: its weights or its examples."""
  return entry.base == 'random' or (
    entry.source == 'tasks' and entry.has_held_out
  )


def _merged(one: Entry, other: Entry) -> Entry:
  """A base with the rows of both of its evaluations."""
  rows = {_what(row): row for row in one.rows}
  for row in other.rows:
    if not _same(rows.setdefault(_what(row), row), row):
      raise ValueError(
        f'{one.folder!r} and {other.folder!r} contradict each other in '
        f'{row.metric} of {row.task!r}, prompt {row.prompt!r}, of the base '
        f'{row.base}; evaluate the base again, or leave one out'
      )
  return dataclasses.replace(one, rows=tuple(rows.values()))


def _what(row: Result) -> tuple:
  return row.data, row.task, row.prompt, row.metric


def _same(one: Result, other: Result) -> bool:
  if one.idx != other.idx or (one.each is None) != (other.each is None):
    return False
  if one.each is None:
    return bool(np.isclose(one.value, other.value, rtol=_ROUNDING))
  return bool(np.allclose(one.each, other.each, rtol=_ROUNDING))


def _twice(one: Entry, other: Entry) -> str:
  if one.folder == other.folder and one.step != other.step:
    return (
      f'{one.folder!r} has rows of its best checkpoint at the steps {one.step} '
      f'and {other.step}; evaluate it again on all data, or remove the old rows'
    )
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
  if len({(e.base, e.base_parameters) for e in firsts}) > 1:
    words.append(f'on {entry.base}')
  sizes = {e.base_parameters for e in firsts if e.base == entry.base}
  if len(sizes) > 1 and entry.base_parameters is not None:
    words.append(f'{entry.base_parameters:,} parameters')
  if entry.is_base:
    seeds = {e.seed for e in firsts if e.is_base and e.base == entry.base}
    if len(seeds) > 1 and _is_seeds(entry):
      words.append(f'seed {entry.seed}')
    return ', '.join(['the base', *words])
  if len({e.semantics for e in trained}) > 1:
    words.append(entry.semantics)
  alike = [
    e
    for e in trained
    if (e.method, e.semantics, e.base, e.base_parameters)
    == (entry.method, entry.semantics, entry.base, entry.base_parameters)
  ]
  if len({e.at for e in alike}) > 1:
    words.append(entry.at)
  keys = [*differing(alike), *_budget(alike)]
  words += [f'{key}={shown(entry.settings.get(key))}' for key in keys]
  return ', '.join(words)


def _budget(entries: Sequence[Entry]) -> list[str]:
  found = []
  for key in ('batch_size', 'steps'):
    values = {entry.settings.get(key) for entry in entries}
    if len(values) > 1 and not (
      # The step has been said.
      key == 'steps' and len({e.at for e in entries}) == len(entries)
    ):
      found.append(key)
  return found


def shown(value: Any) -> str:
  return str(value) if isinstance(value, str) else repr(value)
