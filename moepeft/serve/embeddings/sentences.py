# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder as the server asks for it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moepeft.serve.embeddings.encoder import Encoder


class Sentences:
  """Implements `http.service.Embedder`; the encoder runs on one thread.

  Attributes:
    name: what requests call it.
    width: numbers of a vector.
  """

  def __init__(self, name: str, encoder: Encoder):
    self.name, self.width = name, encoder.width
    self._encoder = encoder
    self._thread = ThreadPoolExecutor(1, 'sentences')

  def warm(self, progress: Callable[[str, int, int], None]) -> None:
    """Compiles every shape."""
    self._thread.submit(self._encoder.warm, progress).result()

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """(vectors float32 [b, d], tokens that were read).

    Raises:
      ValueError: a text does not fit; none is cut in silence.
    """
    tokens = self._encoder.tokens(texts)
    if tokens.truncated:
      raise ValueError(
        f'{tokens.truncated} of {len(texts)} texts have more than the '
        f'{self._encoder.places} tokens of {self.name}; shorten them'
      )
    found = self._thread.submit(self._encoder.embed, texts).result()
    return found.vectors, found.tokens.count
