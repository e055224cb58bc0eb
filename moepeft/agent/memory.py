# SPDX-License-Identifier: Apache-2.0
"""A conversation that is kept within a number of tokens."""

from collections.abc import Callable, Sequence

import openai

from moepeft.agent.chat_model import Message, Request, estimate_tokens, httpx
from moepeft.core.untrusted import Malformed, field, parse_json


class MemoryFullError(ValueError):
  """The part that cannot be dropped is longer than the memory."""


class Memory:
  """The messages after the system prompt.

  The oldest question is dropped first, with its steps and answer; then the
  oldest steps of the current question, where a call and its results are one
  step. The current question's text and its latest step stay.

  Attributes:
    limit: tokens of a request's messages and tools; None for no limit.
    count: the tokens of a request; asked only where there is a limit.
    messages: in order.
    question_start: index of the current question in `messages`.
  """

  def __init__(
    self,
    limit: int | None = None,
    count: Callable[[Request], int] = estimate_tokens,
  ):
    """An empty memory."""
    self.limit, self.count = limit, count
    self.messages: list[Message] = []
    self.question_start = 0

  def add_question(self, text: str) -> None:
    """Adds a question of the user."""
    self.question_start = len(self.messages)
    self.messages.append({'role': 'user', 'content': text})

  def forget(self) -> list[Message]:
    """Drops the oldest messages that may be dropped, and returns them."""
    first, kind = (0, 'user') if self.question_start else (1, 'step')
    end = first + 1
    while end < len(self.messages) and not self._begins(end, kind):
      end += 1
    if end == len(self.messages):
      return []
    lost = self.messages[first:end]
    del self.messages[first:end]
    self.question_start = max(0, self.question_start - end)
    return lost

  def _begins(self, i: int, kind: str) -> bool:
    role = self.messages[i]['role']
    return role == 'user' or (kind == 'step' and role != 'tool')


def merge_user_turns(messages: Sequence[Message]) -> list[Message]:
  """The user's messages in a row as one: templates want roles in turns."""
  merged: list[Message] = []
  for message in messages:
    if merged and message['role'] == merged[-1]['role'] == 'user':
      joined = f'{merged[-1]["content"]}\n\n{message["content"]}'
      merged[-1] = {**merged[-1], 'content': joined}
    else:
      merged.append(message)
  return merged


class TokenCounter:
  """Counts a request's tokens: by the server's /tokenize, else by a guess.

  Attributes:
    exact: whether the server counted the last one.
  """

  def __init__(self, client: openai.OpenAI, model: str):
    """A server that is asked with each request."""
    self.exact, self._client, self._model = False, client, model
    # /tokenize stands beside /v1, not below it.
    self._url = str(client.base_url).rstrip('/').removesuffix('/v1')

  def __call__(self, request: Request) -> int:
    fields = {
      key: request[key] for key in ('messages', 'tools') if key in request
    }
    try:
      answer = self._client.post(
        f'{self._url}/tokenize',
        cast_to=httpx.Response,
        body={'model': self._model, **fields},
      )
      count = field(parse_json(answer.content), 'count', int)
    except (openai.OpenAIError, httpx.HTTPError, Malformed):
      count = -1
    self.exact = count >= 0
    return count if self.exact else estimate_tokens(request)
