# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: proposes tokens that followed the same n-gram earlier.

A decode step then computes the logits after each proposed token as well, and
the engine accepts proposals as long as they are the tokens that it would have
generated one by one. On a machine that is bound by reading the weights, such a
step takes hardly longer than one for a single token. Answers that repeat their
prompt, as summaries and edits do, need fewer steps (A. Saxena, 2023, Prompt
Lookup Decoding; `prompt_lookup_num_tokens` of transformers).
"""

import numpy as np

from moepeft.inference.engine.sequence import Sequence

# Longer n-grams are looked for first.
_LONGEST, _SHORTEST = 3, 2


def propose_all(
  batch: list[Sequence], counts: list[int]
) -> list[tuple[int, ...]]:
  """Returns up to `counts` tokens that may follow each sequence's last."""
  return [
    propose((*sequence.ids, *sequence.answer), count)
    for sequence, count in zip(batch, counts, strict=True)
  ]


def propose(ids: tuple[int, ...], count: int) -> tuple[int, ...]:
  """Returns up to `count` tokens that may follow `ids`; () if none are known.

  They are those after the latest earlier occurrence of the last n tokens.
  """
  tokens = np.asarray(ids)
  if count < 1:
    return ()
  for n in range(_LONGEST, _SHORTEST - 1, -1):
    if len(tokens) <= n:
      continue
    # Occurrences that have a token after them.
    windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
    (starts,) = np.nonzero((windows == tokens[-n:]).all(axis=1))
    if len(starts):
      begin = starts[-1] + n
      return tuple(map(int, tokens[begin : begin + count]))
  return ()
