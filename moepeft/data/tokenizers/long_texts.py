# SPDX-License-Identifier: Apache-2.0
"""Texts of any length as ids, in little memory.

A tokenizer keeps much more of a text than its ids while it works, so it is
given a few texts at a time, and of a long one a part: parts overlap, and are
joined in the overlap where they agree, so that the ids are those of the whole.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Characters that are given at once; then those that neighbours have in common.
PART = 1 << 19
OVERLAP = 1 << 11
# Parts of a long text that are given at once: each may have a thread.
_AT_ONCE = 8
# Ids that agree on either side of a joint.
_AGREE = 8


def encode(
  tokenizer: Any,
  texts: Sequence[str],
  part: int = PART,
  overlap: int = OVERLAP,
) -> list[np.ndarray]:
  """int32 [n] of each text, without special tokens of the tokenizer's own.

  Args:
    tokenizer: of Hugging Face.
    part: characters that are given at once.
    overlap: of neighbouring parts of a text that is longer.
  """
  encoded = []
  for batch in _batches(texts, part):
    if len(batch[0]) > part:
      encoded.append(_long(tokenizer, batch[0], part, overlap))
    else:
      encoded += [np.array(ids, np.int32) for ids in _ids(tokenizer, batch)]
  return encoded


def _batches(texts: Sequence[str], most: int) -> Iterator[list[str]]:
  """Neighbours of so many characters in all; a longer one is by itself."""
  batch, size = [], 0
  for text in texts:
    if batch and size + len(text) > most:
      yield batch
      batch, size = [], 0
    batch.append(text)
    size += len(text)
  if batch:
    yield batch


def _ids(tokenizer: Any, texts: list[str], **places: bool):
  encoding = tokenizer(
    texts,
    add_special_tokens=False,
    return_attention_mask=False,
    return_token_type_ids=False,
    **places,
  )
  return encoding if places else encoding['input_ids']


def _long(tokenizer: Any, text: str, part: int, overlap: int) -> np.ndarray:
  parts, left = [], None
  for right in _parts(tokenizer, text, part, overlap):
    if left is not None:
      middle = int(right[1][0]) + overlap // 2 if len(right[1]) else 0
      joint = _joint(left, right, middle)
      if joint is None:
        # Tokens that are longer than the overlap, or no two readings agree.
        if 4 * overlap > part // _AT_ONCE:
          return np.array(_ids(tokenizer, [text])[0], np.int32)
        return _long(tokenizer, text, part, 2 * overlap)
      parts.append(left[0][: joint[0]])
      right = tuple(array[joint[1] :] for array in right)
    left = right
  return np.concatenate([*parts, left[0]])


def _parts(
  tokenizer: Any, text: str, part: int, overlap: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(ids, where in the text the token of each begins) of parts in order."""
  size = part // _AT_ONCE
  starts = list(range(0, max(len(text) - overlap, 1), size - overlap))
  for i in range(0, len(starts), _AT_ONCE):
    part_starts = starts[i : i + _AT_ONCE]
    texts = [text[start : start + size] for start in part_starts]
    encoding = _ids(tokenizer, texts, return_offsets_mapping=True)
    places = zip(
      part_starts,
      encoding['input_ids'],
      encoding['offset_mapping'],
      strict=True,
    )
    for start, ids, offsets in places:
      begins = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
      yield np.array(ids, np.int32), begins + start


def _joint(left, right, middle: int) -> tuple[int, int] | None:
  """Places in both parts where the same tokens begin, near the middle."""
  (ids, begins), (right_ids, other_begins) = left, right
  places = np.flatnonzero(begins >= middle)
  for i in places[_AGREE : -_AGREE or None]:
    for j in np.flatnonzero(other_begins == begins[i]):
      if j < _AGREE or j + _AGREE > len(right_ids):
        continue
      if np.array_equal(
        ids[i - _AGREE : i + _AGREE], right_ids[j - _AGREE : j + _AGREE]
      ):
        return int(i), int(j)
  return None
