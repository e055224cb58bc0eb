# SPDX-License-Identifier: Apache-2.0
"""Whether runs were evaluated on the same: data, lengths, prompts, examples."""

from collections.abc import Sequence
from typing import Any

from moepeft.data.readers import READERS
from moepeft.evaluation.paper_metric import AVERAGE
from moepeft.evaluation.results import HELD_OUT, Result
from moepeft.evaluation.tables.aggregate import parts
from moepeft.evaluation.tables.run_results import Entry


def check(entries: Sequence[Entry]) -> None:
  """Looks whether runs were evaluated on the same examples and prompts.

  Embedded tasks are drawn anew for every seed: there, runs of one seed. What
  older rows do not say of their data is not compared.

  Raises:
    ValueError: two runs cannot be compared.
  """
  seen, judged = {}, None
  for entry in entries:
    if entry.loss is not None or entry.means:
      judged = judged or entry
      _judged(judged, entry)
    for row in entry.rows:
      _content(seen, row, entry)
      _lengths(seen, row, entry)
    for key, rows in parts(entry):
      if key.dataset != AVERAGE:
        names = {row.task for row in rows}
        where = f'tasks for {key.metric} of {key.data}'
        _counted(seen, key, names, entry, where)
      prompts = {}
      for row in rows:
        prompts.setdefault(row.task, set()).add(row.prompt)
        what = (key, row.task, row.prompt, _seed(row, entry))
        where = f'examples of {row.task!r}, prompt {row.prompt!r}'
        _counted(seen, what, sorted(row.idx), entry, where)
      for task, names in prompts.items():
        _counted(seen, (key, task), names, entry, f'prompts of {task!r}')


def _judged(one: Entry, other: Entry) -> None:
  for key, value in one.judged.items():
    if other.judged[key] != value:
      raise ValueError(
        f'after.json of {one.folder!r} and of {other.folder!r} are of other '
        f'examples: config.{key} is {value!r} and {other.judged[key]!r}; '
        'train both with the same value to compare them'
      )


def _content(seen: dict, row: Result, entry: Entry) -> None:
  # A seed draws embedded tasks, and what the templates of a dataset choose.
  reader = READERS.get(entry.source)
  is_seeded = reader is None or reader.is_seeded
  drawn = row.data == HELD_OUT and is_seeded
  what = ('content', row.data, entry.seed if drawn else None)
  first, folder = _first(seen, what, row.data_sha, entry)
  if first != row.data_sha:
    raise ValueError(
      f'{folder!r} and {entry.folder!r} were evaluated on other rows of the '
      f'name {row.data!r} (hashes {first} and {row.data_sha}); evaluate both '
      'with the same --data, or give files of other content other names'
    )


def _lengths(seen: dict, row: Result, entry: Entry) -> None:
  lengths = row.inputs_length, row.targets_length
  known = None if None in lengths else lengths
  first, folder = _first(seen, ('lengths', row.data), known, entry)
  if first != known:
    raise ValueError(
      f'{folder!r} and {entry.folder!r} were evaluated on {row.data!r} at '
      f'other lengths of inputs and targets ({first} and {known}); evaluate '
      'both with the same --inputs_length and --targets_length'
    )


def _counted(
  seen: dict, what: tuple, found: Any, entry: Entry, where: str
) -> None:
  first, folder = _first(seen, what, found, entry)
  if first != found:
    raise ValueError(
      f'{folder!r} and {entry.folder!r} were evaluated on other {where} '
      f'({len(first)} and {len(found)}); evaluate both with the same --data '
      'and --max_examples'
    )


def _first(
  seen: dict, what: tuple, found: Any, entry: Entry
) -> tuple[Any, str]:
  """(what was found first of something, where); None is passed over."""
  if found is None:
    return None, entry.folder
  return seen.setdefault(what, (found, entry.folder))


def _seed(row: Result, entry: Entry) -> int | None:
  """The seed that chose the rows; None where none did."""
  drawn = entry.source == 'tasks' and row.data == HELD_OUT
  return entry.seed if drawn else None
