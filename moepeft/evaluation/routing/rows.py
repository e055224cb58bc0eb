# SPDX-License-Identifier: Apache-2.0
"""Rows whose routing is shown: a run's held-out rows, or those of a file."""

import collections
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

from moepeft.data import example as example_lib
from moepeft.data import open_data
from moepeft.data.batching.collators import Collator
from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat.dataset import load_chat_template
from moepeft.data.dataset import evenly_spaced, path_name
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import jsonl_rows
from moepeft.inference.loaded_model import LoadedModel


@dataclasses.dataclass(frozen=True)
class LabeledRow:
  """A row with its labels.

  Attributes:
    item: an `Example`, or ids as the model's collator encodes them.
    task: the name of its task or dataset.
    language: its language; '' where the row names none.
  """

  item: Any
  task: str
  language: str = ''


def read(
  run: LoadedModel, collator: Collator, data: str, max_examples: int
) -> list[LabeledRow]:
  """At most `max_examples` rows of each task, evenly spaced.

  Args:
    collator: of the run's model.
    data: a file or directory of JSON lines; '' for the run's held-out rows.

  Raises:
    ValueError: there are no rows, or a row is bad.
  """
  rows = (
    _read_files(run, data) if data else _held_out(run, collator, max_examples)
  )
  by_task = collections.defaultdict(list)
  for row in rows:
    by_task[row.task].append(row)
  return [
    row
    for _, task_rows in sorted(by_task.items())
    for row in evenly_spaced(task_rows, max_examples)
  ]


def _held_out(
  run: LoadedModel, collator: Collator, max_examples: int
) -> list[LabeledRow]:
  config = run.config
  sources = open_data(
    config.data,
    config.seed,
    vocab_size=run.model.config.vocab,
    collator=collator,
  )
  if sources.preferences is not None:
    raise ValueError(
      f'{run.workdir!r} was trained on compared or judged answers, which have '
      'two sides; name rows with inputs and targets, or conversations, with '
      '--data=FILE'
    )
  source = config.data.path and path_name(config.data.path)
  name = source or config.data.source
  by_dataset = sources.held_out_by_dataset(name)
  if sources.read_held_out is not None:
    encoded = sources.read_held_out(max_examples)
    by_dataset = {name: [(e['inputs'], e['targets']) for e in encoded]}
  if not any(map(len, by_dataset.values())):
    raise ValueError(
      f'{run.workdir!r} has no held-out rows; name rows with --data=FILE'
    )
  return [
    LabeledRow(item, dataset)
    for dataset, items in by_dataset.items()
    for item in items
  ]


def _read_files(run: LoadedModel, path: str) -> list[LabeledRow]:
  """The rows of JSON lines: inputs and targets, or conversations."""
  rows, bad, template = [], BadRows(), None
  for file, where, row in _read_lines(path, bad):
    name = re.split(r'\.jsonl', os.path.basename(file), flags=re.I)[0]
    try:
      language = row.get('language') or ''
      if not isinstance(language, str):
        raise BadRow(f"expected text in 'language', got {language!r}")
      if 'inputs' in row:
        item = example_lib.parse_example(row, name, unused=bad.unused)
        task = item.task
      else:
        template = template or load_chat_template(
          run.config.data, run.tokenizer
        )
        conversation = chat_formats.parse_conversation(row, unused=bad.unused)
        item = template.encode(conversation)
        task = row.get('dataset') or row.get('task') or name
        if not isinstance(task, str):
          raise BadRow(f"expected text in 'task', got {task!r}")
      rows.append(LabeledRow(item, task, language))
    except BadRow as e:
      bad(where, e)
  if not rows:
    raise ValueError(f'{path} holds no rows; expected at least one')
  return rows


def _read_lines(path: str, bad: BadRows) -> Iterator[tuple[str, str, dict]]:
  for file in jsonl_rows.row_files(path, bad):
    for where, row in jsonl_rows.read_lines(file, bad):
      yield file, where, row
