# SPDX-License-Identifier: Apache-2.0
"""Shows decoded rows of decoder-only models, with the loss mask."""

import itertools

import numpy as np

from moepeft.core import terminal
from moepeft.core.types import Batch
from moepeft.data.tokenizers.tokenizer import Tokenizer

_GREEN, _PLAIN = '\033[32m', '\033[0m'


def row_segments(batch: Batch, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(ids int [n], loss mask bool [n]) of each segment of a row."""
  # A row that is not packed is one segment.
  mask = batch['inputs_mask'].astype(int)
  segment_ids = batch.get('inputs_segments', mask)[row]
  segments = []
  for segment in range(1, int(segment_ids.max()) + 1):
    in_segment = segment_ids == segment
    inputs, targets = (batch[k][row][in_segment] for k in ('inputs', 'targets'))
    loss_mask = np.append([False], batch['targets_mask'][row][in_segment])
    segments.append((np.append(inputs, targets[-1:]), loss_mask))
  return segments


def loss_spans(
  ids: np.ndarray, loss_mask: np.ndarray, tokenizer: Tokenizer
) -> list[tuple[str, bool]]:
  """(text with special tokens, whether it has a loss) of runs of tokens."""
  return [
    (terminal.visible(tokenizer.show([token for token, _ in run])), has_loss)
    for has_loss, run in itertools.groupby(
      zip(ids.tolist(), loss_mask, strict=True), lambda pair: bool(pair[1])
    )
  ]


def highlight(
  ids: np.ndarray, loss_mask: np.ndarray, tokenizer: Tokenizer, colour: bool
) -> str:
  """Text with special tokens; tokens with a loss are green or in brackets."""
  left, right = (_GREEN, _PLAIN) if colour else '[]'
  return ''.join(
    f'{left}{text}{right}' if has_loss else text
    for text, has_loss in loss_spans(ids, loss_mask, tokenizer)
  )


def row_lines(
  batch: Batch, row: int, tokenizer: Tokenizer, colour: bool
) -> list[str]:
  """The text of a row's segments, each under a line with its token counts."""
  lines = []
  for segment, (ids, loss_mask) in enumerate(row_segments(batch, row), 1):
    lines.append(
      f'\nrow {row}, segment {segment}: {len(ids) - 1} tokens, '
      f'{int(loss_mask.sum())} trained'
    )
    text = highlight(ids, loss_mask, tokenizer, colour)
    lines.append('  ' + text.replace('\n', '\n  '))
  return lines
