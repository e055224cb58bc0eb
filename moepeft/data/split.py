# SPDX-License-Identifier: Apache-2.0
"""Splits rows into training and held-out rows."""

import collections
from collections.abc import Hashable, Sequence

from moepeft.tasks import Example


def hold_out_last(prompts: Sequence[Hashable], share: float) -> list[bool]:
  """Whether each row is held out, about the last `share` of them.

  Rows of one prompt are held out together, in the order of the prompts' first
  rows. A prompt is trained if holding its rows out would miss the share by
  more. The result depends on the rows alone; without repeated prompts it is
  the last rows.

  Args:
    prompts: the prompt of each row.
  """
  groups: dict[Hashable, list[int]] = {}
  for i, prompt in enumerate(prompts):
    groups.setdefault(prompt, []).append(i)
  missing = int(round(len(prompts) * share))
  mask = [False] * len(prompts)
  for indices in reversed(groups.values()):
    if abs(missing - len(indices)) < missing:
      missing -= len(indices)
      for i in indices:
        mask[i] = True
  return mask


def split_by_idx(
  examples: Sequence[Example], held_out: float
) -> tuple[list[Example], list[Example]]:
  """Splits examples into (training, validation) by the last idx of a dataset.

  Templates of one dataset share an example's `idx`, so that it is on one side.
  Rows without an `idx` are numbered in order.

  Args:
    held_out: the share of each dataset's idx to hold out.

  Raises:
    ValueError: no row is left to train on.
  """
  by_task = collections.defaultdict(set)
  numbered = [(e, e.idx if e.idx >= 0 else i) for i, e in enumerate(examples)]
  for e, idx in numbered:
    by_task[e.task].add(idx)
  first = {}
  for task, task_idx in by_task.items():
    ordered = sorted(task_idx)
    cut = len(ordered) - int(round(len(ordered) * held_out))
    first[task] = ordered[cut] if cut < len(ordered) else float('inf')
  train = [e for e, idx in numbered if idx < first[e.task]]
  validation = [e for e, idx in numbered if idx >= first[e.task]]
  if not train:
    raise ValueError(f'held_out={held_out} leaves no row to train on')
  return train, validation
