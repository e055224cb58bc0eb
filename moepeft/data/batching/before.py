# SPDX-License-Identifier: Apache-2.0
"""Placeholders of a soft prompt before texts that are ids."""

from collections.abc import Sequence

import numpy as np


def put(before: Sequence[int], ids: Sequence[int]) -> Sequence[int]:
  """A text behind its placeholders: int32 [n], as it is where there are none.

  Args:
    before: of `moepeft.peft.methods.prompt_tuning.before`.
  """
  if not before:
    return ids
  return np.concatenate([np.asarray(x, np.int32) for x in (before, ids)])


def room(length: int, before: Sequence[int], key: str) -> int:
  """What a row of a length has left for the text.

  Args:
    key: that sets the length.

  Raises:
    ValueError: no token, and its end.
  """
  left = length - len(before)
  if before and left < 2:
    raise ValueError(
      f'a prompt of {len(before)} tokens leaves no room for a text in {key}='
      f'{length}; raise it, or shorten the prompt (its option `length`)'
    )
  return left
