# SPDX-License-Identifier: Apache-2.0
"""A conversation that is limited to a number of tokens."""

from collections.abc import Callable, Sequence

import openai

from moepeft.agent.chat_model import Message, Request, estimate_tokens, httpx
from moepeft.core.untrusted import Malformed, field, parse_json


class MemoryFullError(ValueError):
  """The messages that cannot be dropped exceed the memory's limit."""


class Memory:
  """The messages after the system prompt.

  The oldest question is dropped first, with its steps and answer; then the
  oldest steps of the current question, where a call and its results are one
  step. The current question's text and its latest step stay.

  Attributes:
    limit: maximum tokens of a request's messages and tools; None for no limit.
    count: request -> number of tokens; called only if there is a limit.
    messages: the messages in order.
    question_start: index of the current question in `messages`.
  """

  def __init__(
    self,
    limit: int | None = None,
    count: Callable[[Request], int] = estimate_tokens,
  ):
    self.limit, self.count = limit, count
    self.messages: list[Message] = []
    self.question_start = 0

  def add_question(self, text: str) -> None:
    """Adds a question of the user."""
    self.question_start = len(self.messages)
    self.messages.append({'role': 'user', 'content': text})

  def forget(self) -> list[Message]:
    """Drops the oldest messages that may be dropped, and returns them."""
    first, unit = (0, 'user') if self.question_start else (1, 'step')
    end = first + 1
    while end < len(self.messages) and not self._starts_unit(end, unit):
      end += 1
    if end == len(self.messages):
      return []
    dropped = self.messages[first:end]
    del self.messages[first:end]
    self.question_start = max(0, self.question_start - end)
    return dropped

  def _starts_unit(self, i: int, unit: str) -> bool:
    role = self.messages[i]['role']
    return role == 'user' or (unit == 'step' and role != 'tool')


def merge_user_turns(messages: Sequence[Message]) -> list[Message]:
  """Merges consecutive user messages: templates require alternating roles."""
  merged: list[Message] = []
  for message in messages:
    if merged and message['role'] == merged[-1]['role'] == 'user':
      content = f'{merged[-1]["content"]}\n\n{message["content"]}'
      merged[-1] = {**merged[-1], 'content': content}
    else:
      merged.append(message)
  return merged


class TokenCounter:
  """Counts a request's tokens with the server's /tokenize, or estimates them.

  Attributes:
    exact: whether the server counted the last request.
  """

  def __init__(self, client: openai.OpenAI, model: str):
    self.exact, self._client, self._model = False, client, model
    # The path is /tokenize, not /v1/tokenize.
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
