# SPDX-License-Identifier: Apache-2.0
"""Examples to padded arrays of token ids."""

from collections.abc import Sequence

import numpy as np

from moepeft.data.batching.packing import IdPair
from moepeft.data.tokenizers.tokenizer import Tokenizer, require_eos
from moepeft.tasks import Example

PAD = 0


def encode_truncated(
  vocabulary: Tokenizer, text: str, length: int
) -> tuple[list[int], bool]:
  """(ids with EOS, whether the text's end was cut to `length` for it)."""
  ids = vocabulary.encode(text)
  return ids[: length - 1] + [require_eos(vocabulary)], len(ids) >= length


def encode_example(
  vocabulary: Tokenizer, example: Example, inputs: int, targets: int
) -> tuple[list[int], list[int], bool]:
  """Ids of inputs and targets, both with EOS, and whether one was cut."""
  x, x_cut = encode_truncated(vocabulary, example.inputs, inputs)
  y, y_cut = encode_truncated(vocabulary, example.targets, targets)
  return x, y, x_cut or y_cut


def encode_examples(
  vocabulary: Tokenizer, examples: Sequence[Example], inputs: int, targets: int
) -> list[IdPair]:
  """Inputs and targets of many examples, which tokenizers do faster at once."""
  sides, end = [], np.int32(require_eos(vocabulary))
  for texts, length in (
    ([e.inputs for e in examples], inputs),
    ([e.targets for e in examples], targets),
  ):
    sides.append(
      [
        np.append(np.asarray(ids[: length - 1], np.int32), end)
        for ids in vocabulary.encode_all(texts)
      ]
    )
  return list(map(IdPair, *sides))


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
    inputs int32 [b, s], targets int32 [b, t], decoder_inputs (targets
    shifted right by one, starting with padding's id, as T5 does), and the
    masks inputs_mask, targets_mask, True on real tokens.
  """
  x, y = pad_rows(inputs, inputs_length), pad_rows(targets, targets_length)
  return {
    'inputs': x,
    'targets': y,
    'decoder_inputs': np.pad(y[:, :-1], ((0, 0), (1, 0))),
    'inputs_mask': _real(inputs, inputs_length),
    'targets_mask': _real(targets, targets_length),
  }


def _real(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
  lengths = np.array([len(row) for row in rows])
  return np.arange(length)[None, :] < lengths[:, None]
