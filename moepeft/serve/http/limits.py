# SPDX-License-Identifier: Apache-2.0
"""Limits of one request."""

import dataclasses

# No time, size or count of a request comes near it.
_LARGEST = 10**12


@dataclasses.dataclass(frozen=True)
class RequestLimits:
  """
  Attributes:
    body: bytes of a request.
    answer: tokens of an answer; 0 for as many as the model has places.
    choices: prompts times n.
    seconds: from when the engine has a request to its last token, waiting
      included.
    inputs: texts of a request for embeddings.
    queue: requests for embeddings that wait; the engine has a queue of its own.
  """

  body: int = 1 << 20
  answer: int = 0
  choices: int = 64
  seconds: float = 600.0
  inputs: int = 2048
  queue: int = 64

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      above = value >= 0 if field.name == 'answer' else value > 0
      # NaN is neither above nor below.
      if not (above and value <= _LARGEST):
        least = 'at least' if field.name == 'answer' else 'above'
        raise ValueError(
          f'the limit {field.name} is {least} 0 and at most {_LARGEST:,}; got '
          f'{value}'
        )
