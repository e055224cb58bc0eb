# SPDX-License-Identifier: Apache-2.0
"""A conversation that is kept within so many tokens."""

from collections.abc import Callable, Sequence

import openai

from moepeft.agent.chat_model import Message, Request, estimate_tokens, httpx
from moepeft.core.untrusted import Malformed, field, parse_json


class MemoryFullError(ValueError):
  """What cannot be forgotten is longer than the memory."""


class Memory:
  """What was said since the system prompt.

  What is lost first is the oldest question with all that it led to; then, of
  the question under way, the oldest steps: a call and its results are one. Its
  text and its latest step stay.

  Attributes:
    limit: tokens of a request's messages and tools; None for no limit.
    count: the tokens of a request; asked only where there is a limit.
    messages: in order.
    asked: where the question under way begins.
  """

  def __init__(
    self,
    limit: int | None = None,
    count: Callable[[Request], int] = estimate_tokens,
  ):
    """An empty memory."""
    self.limit, self.count = limit, count
    self.messages: list[Message] = []
    self.asked = 0

  def question(self, text: str) -> None:
    """The user says something new."""
    self.asked = len(self.messages)
    self.messages.append({'role': 'user', 'content': text})

  def forget(self) -> list[Message]:
    """Loses the oldest that may be lost; nothing where all has to stay."""
    first, kind = (0, 'user') if self.asked else (1, 'step')
    end = first + 1
    while end < len(self.messages) and not self._begins(end, kind):
      end += 1
    if end == len(self.messages):
      return []
    lost = self.messages[first:end]
    del self.messages[first:end]
    self.asked = max(0, self.asked - end)
    return lost

  def _begins(self, i: int, kind: str) -> bool:
    role = self.messages[i]['role']
    return role == 'user' or (kind == 'step' and role != 'tool')


def merge_user_turns(messages: Sequence[Message]) -> list[Message]:
  """The user's messages in a row as one: templates want roles in turns."""
  made: list[Message] = []
  for message in messages:
    if made and message['role'] == made[-1]['role'] == 'user':
      joined = f'{made[-1]["content"]}\n\n{message["content"]}'
      made[-1] = {**made[-1], 'content': joined}
    else:
      made.append(message)
  return made


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
    said = {
      key: request[key] for key in ('messages', 'tools') if key in request
    }
    try:
      answer = self._client.post(
        f'{self._url}/tokenize',
        cast_to=httpx.Response,
        body={'model': self._model, **said},
      )
      count = field(parse_json(answer.content), 'count', int)
    except (openai.OpenAIError, httpx.HTTPError, Malformed):
      count = -1
    self.exact = count >= 0
    return count if self.exact else estimate_tokens(request)
