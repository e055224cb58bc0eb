# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of the next token: `seq2seq`'s loss, of decoders alone.

Rows have inputs [b, t] and, as targets, the token that follows each;
targets_mask is True on what is trained: all of a text in pretraining, the
answers in fine-tuning.
"""

import dataclasses

from moepeft.objectives.seq2seq import SEQ2SEQ

CAUSAL = dataclasses.replace(SEQ2SEQ, architecture='decoder')
