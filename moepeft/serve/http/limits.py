# SPDX-License-Identifier: Apache-2.0
"""How much one request may ask of the server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """
  Attributes:
    body: bytes of a request.
    answer: tokens of an answer; 0 for as many as the model has places.
    choices: prompts times n.
    seconds: from when the engine has a request to its last token, waiting
      included.
    inputs: texts of a request for embeddings.
  """

  body: int = 1 << 20
  answer: int = 0
  choices: int = 64
  seconds: float = 600.0
  inputs: int = 2048

  def __post_init__(self):
    for name in ('body', 'choices', 'seconds', 'inputs'):
      if getattr(self, name) <= 0:
        raise ValueError(
          f'the limit {name} is above 0; got {getattr(self, name)}'
        )
    if self.answer < 0:
      raise ValueError(f'the limit answer is at least 0; got {self.answer}')
