# SPDX-License-Identifier: Apache-2.0
"""Chooses an adapter by the content of a request: a router over adapters.

An adapter has example prompts. The mean of their vectors is its centroid, and a
text goes to the adapter of the nearest one, by the cosine.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from moepeft.core import files
from moepeft.data.chat.formats import parse_conversation
from moepeft.data.example import BadRow, BadRows
from moepeft.data.readers import jsonl_rows
from moepeft.serve.embeddings.encoder import SentenceEmbedder

# The examples of an adapter that are embedded, evenly over its file.
MAX_EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class AdapterChoice:
  """The adapter for a text.

  Attributes:
    adapter: its name; '' for the base, where no adapter is near enough.
    similarity: {adapter: cosine of the text and its centroid}.
    threshold: the smallest cosine of an adapter that is chosen.
  """

  adapter: str
  similarity: Mapping[str, float]
  threshold: float


class AdapterChooser:
  """Chooses among adapters with example prompts."""

  def __init__(
    self,
    embedder: SentenceEmbedder,
    examples: Mapping[str, Sequence[str]],
    threshold: float,
  ):
    """
    Args:
      examples: {adapter: prompts}, at least one each.
      threshold: the smallest cosine of an adapter that is chosen.
    """
    self._embedder, self._threshold = embedder, threshold
    self._centroids = {
      name: _unit(self._mean(_evenly(prompts)))
      for name, prompts in examples.items()
    }

  def names(self) -> list[str]:
    return [*self._centroids]

  def choose(
    self, texts: Sequence[str], loaded: Sequence[str]
  ) -> AdapterChoice:
    """Chooses an adapter for texts together; the base if they are blank.

    Args:
      texts: as many of their tokens as the encoder reads count.
      loaded: the adapters that are served now.
    """
    similarity = {}
    if texts := [text for text in texts if text.strip()]:
      vector = _unit(self._mean(texts))
      similarity = {
        name: round(float(vector @ centroid), 4)
        for name, centroid in self._centroids.items()
        if name in loaded
      }
    best = max(similarity, key=similarity.get, default='')
    if best and similarity[best] < self._threshold:
      best = ''
    return AdapterChoice(best, similarity, self._threshold)

  def _mean(self, texts: Sequence[str]) -> np.ndarray:
    vectors, _ = self._embedder.encode(texts, truncate=True)
    return np.mean([_unit(vector) for vector in vectors], axis=0)


def read_examples(path: str) -> list[str]:
  """Reads example prompts.

  Args:
    path: a text file with a prompt a line, or a .jsonl file of training data:
      the `inputs` of its rows, or the user's turns of its conversations.

  Raises:
    ValueError: there is no such file, or it has no prompt or a bad row.
  """
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise ValueError(
      f'{path} is no file; expected example prompts, one a line, or rows of '
      'training data in a .jsonl file'
    )
  if '.jsonl' in os.path.basename(path).lower():
    rows = jsonl_rows.read_lines(path, BadRows())
    prompts = [_prompt(place, row) for place, row in rows]
  else:
    prompts = _lines(path)
  prompts = [prompt for prompt in prompts if prompt.strip()]
  if not prompts:
    raise ValueError(f'{path} has no example prompt; write one a line')
  return prompts


def _lines(path: str) -> list[str]:
  try:
    return files.read_text(path).splitlines()
  except UnicodeDecodeError:
    raise ValueError(f'{path} is no text in UTF-8; convert it') from None


def _prompt(place: str, row: Mapping) -> str:
  if isinstance(row.get('inputs'), str):
    return row['inputs']
  try:
    turns = parse_conversation(row).turns
  except BadRow as e:
    raise ValueError(f'{place}: {e}') from None
  return '\n'.join(turn.content for turn in turns if turn.role == 'user')


def _evenly(prompts: Sequence[str]) -> list[str]:
  count = min(len(prompts), MAX_EXAMPLES)
  return [prompts[i * len(prompts) // count] for i in range(count)]


def _unit(vector: np.ndarray) -> np.ndarray:
  return vector / max(float(np.linalg.norm(vector)), 1e-12)
