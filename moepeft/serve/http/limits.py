# SPDX-License-Identifier: Apache-2.0
"""The limits of a request."""

import dataclasses

# Far above every useful time, size or count.
_LARGEST = 10**12


@dataclasses.dataclass(frozen=True)
class RequestLimits:
  """The maximum values of a request.

  Attributes:
    body: the size of the body in bytes.
    answer: the tokens of an answer; 0 for as many as fit.
    choices: the number of prompts times n.
    seconds: the time from the submission to the last token, queueing included.
    inputs: the number of texts in a request for embeddings.
    queue: the number of waiting requests for embeddings; the engine has its own
      queue.
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
      in_range = value >= 0 if field.name == 'answer' else value > 0
      # Written so that NaN is refused.
      if not (in_range and value <= _LARGEST):
        bound = 'at least' if field.name == 'answer' else 'above'
        raise ValueError(
          f'the limit {field.name} is {bound} 0 and at most {_LARGEST:,}; got '
          f'{value}'
        )
