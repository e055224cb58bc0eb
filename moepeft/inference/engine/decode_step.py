# SPDX-License-Identifier: Apache-2.0
"""The decode step: the logits of each running sequence's next token."""

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
) -> StepOutput:
  """Computes the next token of sequences whose prompts are read.

  Returns:
    n rows, n at least the number of sequences; theirs are the first.
  """
  n = padded_size(runner.config.batch_sizes, len(batch))
  # A row that no sequence has computes the first again.
  rows = [*batch, *[batch[0]] * (n - len(batch))]
  return runner.decode(
    n,
    padded_size(runner.cache_lens, max(map(prefill.cache_len, batch))),
    np.stack([sequence.adapter.row for sequence in rows]),
    np.array([sequence.slot.number for sequence in rows], np.int32),
    *prefill.decode_inputs(rows),
  )
