# SPDX-License-Identifier: Apache-2.0
"""Groups runs that differ only by their seed into the rows of a table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepeft.evaluation.results import Result
from moepeft.evaluation.tables.run_results import RunResults

# Relative rounding differences between evaluations on different machines.
_RTOL = 1e-4


@dataclasses.dataclass(frozen=True)
class SeedGroup:
  """A row of a table.

  Attributes:
    entries: one run per seed, in the order of the command line.
    qualifier: text that distinguishes it from other rows of the same method.
  """

  entries: tuple[RunResults, ...]
  qualifier: str = ''

  @property
  def first(self) -> RunResults:
    return self.entries[0]


def group_by_seed(entries: Sequence[RunResults]) -> list[SeedGroup]:
  """Groups runs by seed, in the order of each group's first run.

  The results of one base from several runs are merged.

  Raises:
    ValueError: a run is given twice, two runs have the same settings and seed,
      or results of one base contradict each other.
  """
  by_key = {}
  for entry in _with_base_sizes(entries):
    members = by_key.setdefault(_group_key(entry), [])
    if entry.is_base and members:
      members[0] = _merge_base(members[0], entry)
      continue
    for member in members:
      if member.seed == entry.seed:
        raise ValueError(_duplicate_message(member, entry))
    members.append(entry)
  rows = [tuple(members) for members in by_key.values()]
  return [SeedGroup(members, _qualifier(members[0], rows)) for members in rows]


def differing_settings(entries: Sequence[RunResults]) -> list[str]:
  """Config keys in which entries differ, except those of the budget."""
  keys = sorted({key for entry in entries for key in entry.settings})
  return [
    key
    for key in keys
    if key not in ('steps', 'batch_size')
    and len({repr(entry.settings.get(key)) for entry in entries}) > 1
  ]


def _group_key(entry: RunResults) -> tuple:
  base = entry.base, entry.base_parameters
  if entry.is_base:
    return entry.method, base, entry.seed if _depends_on_seed(entry) else None
  settings = tuple(sorted((k, repr(v)) for k, v in entry.settings.items()))
  return entry.method, entry.semantics, base, entry.checkpoint_label, settings


def _with_base_sizes(entries: Sequence[RunResults]) -> list[RunResults]:
  """Adds base_parameters to runs without results, from other runs' bases."""
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


def _depends_on_seed(entry: RunResults) -> bool:
  """Whether a base's results depend on the seed, by weights or examples."""
  return entry.base == 'random' or (
    entry.generates_tasks and entry.has_held_out
  )


def _merge_base(first: RunResults, second: RunResults) -> RunResults:
  """Merges the results of two evaluations of one base."""
  rows = {_result_key(row): row for row in first.rows}
  for row in second.rows:
    if not _equal_scores(rows.setdefault(_result_key(row), row), row):
      raise ValueError(
        f'{first.folder!r} and {second.folder!r} contradict each other in '
        f'{row.metric} of {row.task!r}, prompt {row.prompt!r}, of the base '
        f'{row.base}; evaluate the base again, or leave one out'
      )
  return dataclasses.replace(first, rows=tuple(rows.values()))


def _result_key(row: Result) -> tuple:
  return row.data, row.task, row.prompt, row.metric


def _equal_scores(first: Result, second: Result) -> bool:
  if first.idx != second.idx or (first.each is None) != (second.each is None):
    return False
  if first.each is None:
    return bool(np.isclose(first.value, second.value, rtol=_RTOL))
  return bool(np.allclose(first.each, second.each, rtol=_RTOL))


def _duplicate_message(first: RunResults, second: RunResults) -> str:
  if first.folder == second.folder and first.step != second.step:
    return (
      f'{first.folder!r} has rows of its best checkpoint at the steps '
      f'{first.step} and {second.step}; evaluate it again on all data, or '
      'remove the old rows'
    )
  if first.folder == second.folder:
    return f'{first.folder!r} is given twice; name it once'
  return (
    f'{first.folder!r} and {second.folder!r} are one method with the same '
    f'settings and seed {first.seed}: they are no two seeds; leave one out'
  )


def _qualifier(
  entry: RunResults, rows: Sequence[tuple[RunResults, ...]]
) -> str:
  """Text that distinguishes a row, of the values in which rows differ."""
  firsts = [members[0] for members in rows]
  trained = [e for e in firsts if not e.is_base]
  parts = []
  if len({(e.base, e.base_parameters) for e in firsts}) > 1:
    parts.append(f'on {entry.base}')
  sizes = {e.base_parameters for e in firsts if e.base == entry.base}
  if len(sizes) > 1 and entry.base_parameters is not None:
    parts.append(f'{entry.base_parameters:,} parameters')
  if entry.is_base:
    seeds = {e.seed for e in firsts if e.is_base and e.base == entry.base}
    if len(seeds) > 1 and _depends_on_seed(entry):
      parts.append(f'seed {entry.seed}')
    return ', '.join(['the base', *parts])
  if len({e.semantics for e in trained}) > 1:
    parts.append(entry.semantics)
  same_method = [
    e
    for e in trained
    if (e.method, e.semantics, e.base, e.base_parameters)
    == (entry.method, entry.semantics, entry.base, entry.base_parameters)
  ]
  if len({e.checkpoint_label for e in same_method}) > 1:
    parts.append(entry.checkpoint_label)
  keys = [*differing_settings(same_method), *_differing_budget(same_method)]
  parts += [f'{key}={format_value(entry.settings.get(key))}' for key in keys]
  return ', '.join(parts)


def _differing_budget(entries: Sequence[RunResults]) -> list[str]:
  keys = []
  for key in ('batch_size', 'steps'):
    values = {entry.settings.get(key) for entry in entries}
    if len(values) > 1 and not (
      # The checkpoint's label has the step.
      key == 'steps'
      and len({e.checkpoint_label for e in entries}) == len(entries)
    ):
      keys.append(key)
  return keys


def format_value(value: Any) -> str:
  return str(value) if isinstance(value, str) else repr(value)
