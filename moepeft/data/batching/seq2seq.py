# SPDX-License-Identifier: Apache-2.0
"""Tokenizes and pads the examples of encoder-decoders."""

from collections.abc import Sequence

import numpy as np

from moepeft.data.batching.packing import TokenizedPair
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos
from moepeft.tasks import Example

PAD = 0


def encode_truncated(
  tokenizer: Tokenizer, text: str, length: int
) -> tuple[list[int], bool]:
  """(at most `length` ids, the last of them EOS; whether the text was cut)."""
  ids = tokenizer.encode(text)
  return ids[: length - 1] + [require_eos(tokenizer)], len(ids) >= length


def encode_example(
  tokenizer: Tokenizer,
  example: Example,
  inputs_length: int,
  targets_length: int,
) -> tuple[list[int], list[int], bool]:
  """Ids of inputs and targets, both with EOS, and whether one was cut."""
  x, x_cut = encode_truncated(tokenizer, example.inputs, inputs_length)
  y, y_cut = encode_truncated(tokenizer, example.targets, targets_length)
  return x, y, x_cut or y_cut


def encode_examples(
  tokenizer: Tokenizer,
  examples: Sequence[Example],
  inputs_length: int,
  targets_length: int,
) -> list[TokenizedPair]:
  """`encode_example` of many examples; tokenizers are faster on batches."""
  sides, eos = [], np.int32(require_eos(tokenizer))
  for texts, length in (
    ([e.inputs for e in examples], inputs_length),
    ([e.targets for e in examples], targets_length),
  ):
    sides.append(
      [
        np.append(np.asarray(ids[: length - 1], np.int32), eos)
        for ids in tokenizer.encode_all(texts)
      ]
    )
  return list(map(TokenizedPair, *sides))


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
  """int32 [b, length], padded with zeros on the right."""
  out = np.full((len(rows), length), PAD, np.int32)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out


def pad_pairs(
  inputs: Sequence[Sequence[int]],
  targets: Sequence[Sequence[int]],
  inputs_length: int,
  targets_length: int,
) -> dict[str, np.ndarray]:
  """The batch of an encoder-decoder.

  Returns:
    inputs int32 [b, s]; targets int32 [b, t]; decoder_inputs int32 [b, t],
    the targets shifted right by one, with padding's id first, as in T5; and
    inputs_mask bool [b, s], targets_mask bool [b, t], True except on padding.
  """
  x, y = pad_rows(inputs, inputs_length), pad_rows(targets, targets_length)
  return {
    'inputs': x,
    'targets': y,
    'decoder_inputs': np.pad(y[:, :-1], ((0, 0), (1, 0))),
    'inputs_mask': _padding_mask(inputs, inputs_length),
    'targets_mask': _padding_mask(targets, targets_length),
  }


def _padding_mask(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
  lengths = np.array([len(row) for row in rows])
  return np.arange(length)[None, :] < lengths[:, None]
