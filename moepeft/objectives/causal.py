# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of the next token, for decoder-only models.

The loss function is that of `seq2seq`. Rows have inputs [b, t] and targets
[b, t], the next tokens. targets_mask is True on the tokens to learn: all tokens
in pretraining, and those of answers in fine-tuning.
"""

import dataclasses

from moepeft.objectives.seq2seq import SEQ2SEQ

CAUSAL = dataclasses.replace(SEQ2SEQ, architecture='decoder')
