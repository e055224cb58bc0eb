# SPDX-License-Identifier: Apache-2.0
"""Which rows are held out where several may have the same prompt."""

from collections.abc import Hashable, Sequence


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
