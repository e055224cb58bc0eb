# SPDX-License-Identifier: Apache-2.0
"""Checks that runs were evaluated on the same data, prompts and examples."""

from collections.abc import Sequence
from typing import Any

from moepeft.data.readers import READERS
from moepeft.evaluation.paper_metric import AVERAGE
from moepeft.evaluation.results import HELD_OUT, Result
from moepeft.evaluation.tables.aggregate import results_by_column
from moepeft.evaluation.tables.run_results import RunResults


def check_comparable(entries: Sequence[RunResults]) -> None:
  """Checks that runs were evaluated on the same examples and prompts.

  Examples of embedded tasks depend on the seed, so they are compared between
  runs of the same seed. Fields that older results lack are not compared.

  Raises:
    ValueError: two runs cannot be compared.
  """
  first_values, first_evaluated = {}, None
  for entry in entries:
    if entry.loss is not None or entry.means:
      first_evaluated = first_evaluated or entry
      _check_same_evaluation_config(first_evaluated, entry)
    for row in entry.rows:
      _check_same_data(first_values, row, entry)
      _check_same_lengths(first_values, row, entry)
    for key, rows in results_by_column(entry):
      if key.dataset != AVERAGE:
        names = {row.task for row in rows}
        where = f'tasks for {key.metric} of {key.data}'
        _check_same_examples(first_values, key, names, entry, where)
      prompts = {}
      for row in rows:
        prompts.setdefault(row.task, set()).add(row.prompt)
        prompt_key = (key, row.task, row.prompt, _seed(row, entry))
        where = f'examples of {row.task!r}, prompt {row.prompt!r}'
        _check_same_examples(
          first_values, prompt_key, sorted(row.idx), entry, where
        )
      for task, names in prompts.items():
        _check_same_examples(
          first_values, (key, task), names, entry, f'prompts of {task!r}'
        )


def _check_same_evaluation_config(
  first: RunResults, second: RunResults
) -> None:
  for key, value in first.evaluation_config.items():
    second_value = second.evaluation_config[key]
    if second_value != value:
      raise ValueError(
        f'after.json of {first.folder!r} and of {second.folder!r} are of other '
        f'examples: config.{key} is {value!r} and {second_value!r}; '
        'train both with the same value to compare them'
      )


def _check_same_data(
  first_values: dict, row: Result, entry: RunResults
) -> None:
  # The seed draws embedded tasks, and the random choices of templates.
  reader = READERS.get(entry.source)
  is_seeded = reader is None or reader.is_seeded
  depends_on_seed = row.data == HELD_OUT and is_seeded
  key = ('content', row.data, entry.seed if depends_on_seed else None)
  first, folder = _first_seen(first_values, key, row.data_sha, entry)
  if first != row.data_sha:
    raise ValueError(
      f'{folder!r} and {entry.folder!r} were evaluated on other rows of the '
      f'name {row.data!r} (hashes {first} and {row.data_sha}); evaluate both '
      'with the same --data, or give files of other content other names'
    )


def _check_same_lengths(
  first_values: dict, row: Result, entry: RunResults
) -> None:
  lengths = row.inputs_length, row.targets_length
  value = None if None in lengths else lengths
  first, folder = _first_seen(first_values, ('lengths', row.data), value, entry)
  if first != value:
    raise ValueError(
      f'{folder!r} and {entry.folder!r} were evaluated on {row.data!r} at '
      f'other lengths of inputs and targets ({first} and {value}); evaluate '
      'both with the same --inputs_length and --targets_length'
    )


def _check_same_examples(
  first_values: dict, key: tuple, value: Any, entry: RunResults, where: str
) -> None:
  first, folder = _first_seen(first_values, key, value, entry)
  if first != value:
    raise ValueError(
      f'{folder!r} and {entry.folder!r} were evaluated on other {where} '
      f'({len(first)} and {len(value)}); evaluate both with the same --data '
      'and --max_examples'
    )


def _first_seen(
  first_values: dict, key: tuple, value: Any, entry: RunResults
) -> tuple[Any, str]:
  """(the first value of a key, its folder); a value of None is not stored."""
  if value is None:
    return None, entry.folder
  return first_values.setdefault(key, (value, entry.folder))


def _seed(row: Result, entry: RunResults) -> int | None:
  """The seed that the examples depend on, or None."""
  depends_on_seed = entry.generates_tasks and row.data == HELD_OUT
  return entry.seed if depends_on_seed else None
