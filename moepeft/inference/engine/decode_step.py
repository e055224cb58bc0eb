# SPDX-License-Identifier: Apache-2.0
"""The decode step: the logits of each running sequence's next tokens."""

import numpy as np

from moepeft.inference.engine.limits import padded_size
from moepeft.inference.engine.model_runner import ModelRunner
from moepeft.inference.engine.prefill import (
  DecoderPrefill,
  EncoderDecoderPrefill,
)
from moepeft.inference.engine.sampler import StepOutput
from moepeft.inference.engine.sequence import Sequence


def decode_step(
  runner: ModelRunner,
  prefill: DecoderPrefill | EncoderDecoderPrefill,
  batch: list[Sequence],
  proposals: list[tuple[int, ...]],
) -> StepOutput:
  """Computes the next token of sequences whose prompts are read.

  Args:
    proposals: for each sequence, the tokens that may follow its last.

  Returns:
    n rows of t tokens. The rows of the sequences are the first; t is at least
    one more than the length of the longest proposal.
  """
  config = runner.config
  n = padded_size(config.batch_sizes, len(batch))
  t = padded_size(config.decode_lens, 1 + max(map(len, proposals)))
  # A row that no sequence has computes the first again.
  rows = [*batch, *[batch[0]] * (n - len(batch))]
  proposals = [*proposals, *[proposals[0]] * (n - len(batch))]
  length = max(map(prefill.cache_len, batch)) + t - 1
  return runner.decode(
    n,
    padded_size(runner.cache_lens, length),
    np.stack([sequence.adapter.row for sequence in rows]),
    np.array([sequence.slot.number for sequence in rows], np.int32),
    *prefill.decode_inputs(rows, proposals, t),
  )
