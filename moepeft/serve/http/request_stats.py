# SPDX-License-Identifier: Apache-2.0
"""The token counts and times of an HTTP request, for log and metrics."""

import dataclasses
import time
from typing import Any


@dataclasses.dataclass
class RequestStats:
  """The statistics of a request, updated while it is answered.

  Attributes:
    id: the request id, which is also the response header x-request-id.
    client: the client's name in the engine's fair queue.
    model: the name of the requested model; '' for none.
    prompt, cached, answer: the numbers of tokens.
    started, first_token, last_token: the `time.perf_counter` of the start and
      of the first and last token; None before the token.
  """

  id: str
  client: str = ''
  model: str = ''
  prompt: int = 0
  cached: int = 0
  answer: int = 0
  started: float = dataclasses.field(default_factory=time.perf_counter)
  first_token: float | None = None
  last_token: float | None = None

  def add_tokens(self, count: int) -> None:
    """Records new tokens of an answer."""
    self.last_token = time.perf_counter()
    self.first_token = (
      self.last_token if self.first_token is None else self.first_token
    )
    self.answer += count

  @property
  def time_to_first_token(self) -> float | None:
    """Seconds to the first token; None before it."""
    return None if self.first_token is None else self.first_token - self.started

  @property
  def time_per_token(self) -> float | None:
    """Mean seconds between tokens; None with fewer than two tokens."""
    if self.first_token is None or self.answer < 2:
      return None
    return (self.last_token - self.first_token) / (self.answer - 1)

  def log_line(self, method: str, path: str, status: int, address: str) -> str:
    """The line of the access log."""
    seconds = time.perf_counter() - self.started
    parts = [f'{address} {method} {path} {status} {seconds:.3f} s id={self.id}']
    if self.model:
      parts.append(f'model={self.model}')
    if self.prompt:
      parts.append(f'in={self.prompt} cached={self.cached} out={self.answer}')
    if self.time_to_first_token is not None:
      parts.append(f'first={self.time_to_first_token:.3f} s')
    if self.time_per_token:
      parts.append(f'{1 / self.time_per_token:.1f} tokens/s')
    return ' '.join(parts)


def usage(stats: RequestStats) -> dict[str, Any]:
  return {
    'prompt_tokens': stats.prompt,
    'completion_tokens': stats.answer,
    'total_tokens': stats.prompt + stats.answer,
    'prompt_tokens_details': {
      # With n > 1, each answer counts the cached tokens of the same prompt.
      'cached_tokens': min(stats.cached, stats.prompt)
    },
  }
