# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions `(apply, variables, batch, rngs) -> (sum, aux)`.

The sum is divided by aux['weight'], which depends on data alone: parts of a
batch add up to the whole. A new one is one new file and one line in
OBJECTIVES.
"""

import functools
from collections.abc import Callable

from moepeft.objectives import causal, seq2seq
from moepeft.objectives.loss import PLAIN, Loss

OBJECTIVES = {'seq2seq': seq2seq.objective, 'causal': causal.objective}
# Those whose batches have an encoder's side; the others are of decoders.
_OF_ENCODERS = ('seq2seq',)


def objective_of(name: str, loss: Loss = PLAIN) -> Callable:
  """The objective that config.objective names, with what config.loss says.

  Raises:
    ValueError: there is no such objective.
  """
  if name not in OBJECTIVES:
    raise ValueError(
      f'config.objective is one of {", ".join(OBJECTIVES)}; got {name!r}'
    )
  return functools.partial(OBJECTIVES[name], loss=loss)


def check_model(name: str, decoder_only: bool) -> None:
  """Refuses an objective of the other kind of model.

  Raises:
    ValueError: it is.
  """
  if decoder_only and name in _OF_ENCODERS:
    raise ValueError(
      f'config.objective={name!r} is of encoder-decoders and the model is '
      "decoder-only; set it to 'causal'"
    )
  if not decoder_only and name not in _OF_ENCODERS:
    raise ValueError(
      f'config.objective={name!r} is of decoder-only models and the model is '
      "an encoder-decoder; set it to 'seq2seq'"
    )
