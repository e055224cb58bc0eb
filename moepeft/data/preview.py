# SPDX-License-Identifier: Apache-2.0
"""Decoded rows of decoder-only models: what is trained, and what is not."""

import itertools

import numpy as np

from moepeft.core import terminal
from moepeft.core.types import Batch
from moepeft.data.tokenizers.tokenizer import Tokenizer

_GREEN, _PLAIN = '\033[32m', '\033[0m'


def row_segments(part: Batch, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(ids int [n], trained bool [n]) of each segment of a row."""
  # A row of its own where nothing is packed.
  segment_ids = part.get('inputs_segments', part['inputs_mask'].astype(int))[
    row
  ]
  segments = []
  for segment in range(1, int(segment_ids.max()) + 1):
    at = segment_ids == segment
    ids = np.append(part['inputs'][row][at], part['targets'][row][at][-1:])
    trained = np.append([False], part['targets_mask'][row][at])
    segments.append((ids, trained))
  return segments


def highlight(
  ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer, colour: bool
) -> str:
  """The text, special tokens visible, trained tokens green or in brackets."""
  shown = []
  for is_trained, run in itertools.groupby(
    zip(ids.tolist(), trained, strict=True), lambda pair: bool(pair[1])
  ):
    text = terminal.visible(tokenizer.show([token for token, _ in run]))
    if is_trained:
      text = f'{_GREEN}{text}{_PLAIN}' if colour else f'[{text}]'
    shown.append(text)
  return ''.join(shown)


def row_lines(
  part: Batch, row: int, tokenizer: Tokenizer, colour: bool
) -> list[str]:
  """A row's segments, each under a line that says how much is trained."""
  lines = []
  for number, (ids, trained) in enumerate(row_segments(part, row), 1):
    lines.append(
      f'\nrow {row}, segment {number}: {len(ids) - 1} tokens, '
      f'{int(trained.sum())} trained'
    )
    shown = highlight(ids, trained, tokenizer, colour)
    lines.append('  ' + shown.replace('\n', '\n  '))
  return lines
