# SPDX-License-Identifier: Apache-2.0
"""Task ids of a batch, for methods whose routers read the task.

`tasks` are the task names of the routers, () where no router reads a task:
batches then have no task ids. Ids count from 1; 0 is padding.
"""

from collections.abc import Sequence

import numpy as np

from moepeft.core.ranges import suggestion


def task_id(tasks: Sequence[str], name: str) -> int:
  """The id of an example's task; 0 where no router reads tasks.

  Raises:
    ValueError: the routers have no id for the task.
  """
  if not tasks:
    return 0
  if name not in tasks:
    raise ValueError(
      f"an example is of the task {name!r}, and the method's router has ids "
      f"for {', '.join(tasks)} alone; add it to the router's option `tasks`, "
      f'or leave its rows out{suggestion(name, tasks)}'
    )
  return tasks.index(name) + 1


def add_task_ids(
  rows: dict[str, np.ndarray],
  tasks: Sequence[str],
  ids: Sequence[int],
  bins: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
  """Rows with int32 <side>_tasks [b, t], the id of each token's example.

  Args:
    rows: a collator's `pad` or `pack`; unchanged where `tasks` is empty.
    ids: each example's `task_id`.
    bins: indices of each row's examples; by default row i has example i.

  Raises:
    ValueError: an example has no task.
  """
  if not tasks:
    return rows
  if not all(ids):
    raise ValueError(
      "the method's router reads the task of each example, and rows of "
      'config.data.source have none; use a source whose rows have inputs, '
      'targets and a task, or another router'
    )
  if bins is None:
    bins = [[i] for i in range(len(ids))]
  rows = dict(rows)
  # A decoder's targets are its inputs, shifted, so one array serves both.
  sides = ('inputs', 'targets') if 'decoder_inputs' in rows else ('inputs',)
  for side in sides:
    segments = rows.get(f'{side}_segments', rows[f'{side}_mask'])
    # Column k is the task of segment k.
    segment_tasks = np.zeros((len(bins), max(map(len, bins)) + 1), np.int32)
    for row, items in enumerate(bins):
      segment_tasks[row, 1 : len(items) + 1] = [ids[item] for item in items]
    rows[f'{side}_tasks'] = np.take_along_axis(
      segment_tasks, segments.astype(np.int32), axis=1
    )
  return rows
