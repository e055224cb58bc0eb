# SPDX-License-Identifier: Apache-2.0
"""The split of rows into those to train on and those held out."""

import collections
from collections.abc import Hashable, Sequence

from moepeft.tasks import Example


def hold_out_last(prompts: Sequence[Hashable], share: float) -> list[bool]:
  """Whether each row is held out: about the last `share` of them.

  Rows of one prompt stay together, where the first of them is; a prompt with
  so many rows that the share is better met without them is trained. The same
  rows give the same answer, in every run; where no prompt repeats, it is the
  last of them, rounded.
  """
  groups: dict[Hashable, list[int]] = {}
  for place, prompt in enumerate(prompts):
    groups.setdefault(prompt, []).append(place)
  left = int(round(len(prompts) * share))
  out = [False] * len(prompts)
  for places in reversed(groups.values()):
    if abs(left - len(places)) < left:
      left -= len(places)
      for place in places:
        out[place] = True
  return out


def split_by_idx(
  examples: Sequence[Example], held_out: float
) -> tuple[list[Example], list[Example]]:
  """(training, validation): the last `held_out` of each dataset's idx.

  Templates of one dataset share examples, so the split goes by `idx`; rows
  without one go by their order.
  """
  keys = collections.defaultdict(set)
  numbered = [(e, e.idx if e.idx >= 0 else i) for i, e in enumerate(examples)]
  for e, key in numbered:
    keys[e.task].add(key)
  first = {}
  for task, keys_of_task in keys.items():
    ordered = sorted(keys_of_task)
    cut = len(ordered) - int(round(len(ordered) * held_out))
    first[task] = ordered[cut] if cut < len(ordered) else float('inf')
  train = [e for e, key in numbered if key < first[e.task]]
  validation = [e for e, key in numbered if key >= first[e.task]]
  if not train:
    raise ValueError(f'held_out={held_out} leaves no row to train on')
  return train, validation
