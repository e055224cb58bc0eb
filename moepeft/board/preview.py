# SPDX-License-Identifier: Apache-2.0
"""The first training rows of a config, with the tokens that are trained."""

from typing import Any

from ml_collections import ConfigDict

from moepeft.core import terminal
from moepeft.data.__main__ import (
  first_items,
  heading,
  open_training_data,
  row_examples,
  split_sides,
)
from moepeft.data.loader import WINDOW_SIZE
from moepeft.data.preview import loss_spans, row_segments


def preview(config: ConfigDict, rows: int) -> dict[str, Any]:
  """The examples of the first rows of the first batch.

  Returns:
    'notes', and 'examples': {'row', 'side', 'tokens', 'trained', 'spans'},
    where spans are [text, whether it is trained].

  Raises:
    ValueError: the data, the tokenizer or the model cannot be read.
  """
  source, collator, is_decoder = open_training_data(config)
  _, items = first_items(source, WINDOW_SIZE)
  batch = collator.rows(0, collator.encode(items))
  examples = []
  for row in range(min(rows, len(next(iter(batch.values()))))):
    for side, part in split_sides(batch, collator):
      label = heading(side, batch, row, collator.packed)
      for spans, counts in (
        _decoder_examples(part, row, collator.tokenizer)
        if is_decoder
        else _examples(part, row, collator.tokenizer)
      ):
        examples.append(
          {
            'row': row,
            'side': label,
            'tokens': counts[0],
            'trained': counts[1],
            'spans': spans,
          }
        )
  return {'notes': [*source.notes], 'examples': examples}


def _decoder_examples(batch, row, tokenizer):
  """(spans, (tokens, trained tokens)) of each segment of a decoder's row."""
  for ids, loss_mask in row_segments(batch, row):
    counts = len(ids) - 1, int(loss_mask.sum())
    yield loss_spans(ids, loss_mask, tokenizer), counts


def _examples(batch, row, tokenizer):
  """As `_decoder_examples`, of an encoder's inputs and a decoder's targets."""
  for inputs, targets in row_examples(batch, row):
    x, y = (
      terminal.visible(tokenizer.show(ids.tolist()))
      for ids in (inputs, targets)
    )
    counts = len(inputs) + len(targets), len(targets)
    yield [(x, False), (y, True)], counts
