# SPDX-License-Identifier: Apache-2.0
"""Tokens and times of one HTTP request, for the log and the metrics."""

import dataclasses
import time
from typing import Any


@dataclasses.dataclass
class RequestStats:
  """Filled in while a request is answered.

  Attributes:
    id: of the request, also in the response's header x-request-id.
    client: who asks, for the engine's turns: by key, or by address.
    model: that was asked for, '' if none was.
    prompt, cached, answer: tokens.
    began, first, last: seconds of a clock at its beginning, its first and its
      last token; None where there was none.
  """

  id: str
  client: str = ''
  model: str = ''
  prompt: int = 0
  cached: int = 0
  answer: int = 0
  began: float = dataclasses.field(default_factory=time.perf_counter)
  first: float | None = None
  last: float | None = None

  def tokens(self, count: int) -> None:
    """Notes that so many tokens of an answer have come."""
    self.last = time.perf_counter()
    self.first = self.last if self.first is None else self.first
    self.answer += count

  @property
  def to_first(self) -> float | None:
    """Seconds to the first token."""
    return None if self.first is None else self.first - self.began

  @property
  def per_token(self) -> float | None:
    """Seconds a token after the first; None where there is one alone."""
    if self.first is None or self.answer < 2:
      return None
    return (self.last - self.first) / (self.answer - 1)

  def line(self, method: str, path: str, status: int, address: str) -> str:
    """The line of the access log."""
    took = time.perf_counter() - self.began
    parts = [f'{address} {method} {path} {status} {took:.3f} s id={self.id}']
    if self.model:
      parts.append(f'model={self.model}')
    if self.prompt:
      parts.append(f'in={self.prompt} cached={self.cached} out={self.answer}')
    if self.to_first is not None:
      parts.append(f'first={self.to_first:.3f} s')
    if self.per_token:
      parts.append(f'{1 / self.per_token:.1f} tokens/s')
    return ' '.join(parts)


def usage(stats: RequestStats) -> dict[str, Any]:
  return {
    'prompt_tokens': stats.prompt,
    'completion_tokens': stats.answer,
    'total_tokens': stats.prompt + stats.answer,
    'prompt_tokens_details': {
      # Answers to one prompt share it.
      'cached_tokens': min(stats.cached, stats.prompt)
    },
  }
