# SPDX-License-Identifier: Apache-2.0
"""A conversation that is kept within so many tokens."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openai

from moepeft.agent.events import Counted, Forgotten, Tell, ignore
from moepeft.agent.model import estimate

Message = Mapping[str, Any]
# What a chat template puts around a message, about.
AROUND = 8


class Full(ValueError):
  """What cannot be forgotten is longer than the memory."""


@dataclasses.dataclass(frozen=True)
class Unit:
  """Messages that are kept or lost together: a call and its results are one."""

  messages: tuple[Message, ...]
  question: bool = False


class Memory:
  """The system prompt, and what was said since.

  `count` and `summarise` are asked for their opinion only where there is a
  limit. What is lost first is the oldest question with all that it led to;
  then, of the question under way, the oldest steps. Its text and its latest
  step stay.
  """

  def __init__(
    self,
    limit: int | None = None,
    count: Callable[[str], int] = estimate,
    summarise: Callable[[Sequence[Message]], str] | None = None,
  ):
    """An empty memory.

    Args:
      limit: tokens of all messages together; None for no limit.
      count: the tokens of a text; the default is an estimate.
      summarise: makes a text of messages that are lost; None for none.
    """
    self.limit, self.count, self.summarise = limit, count, summarise
    self.units: list[Unit] = []
    self.summary = ''
    self._counted: dict[str, int] = {}

  def question(self, text: str) -> None:
    """The user says something new."""
    self.units.append(Unit(({'role': 'user', 'content': text},), True))

  def step(self, messages: Sequence[Message]) -> None:
    """A step of the answer, whole."""
    self.units.append(Unit(tuple(messages)))

  def messages(self, system: str, tell: Tell = ignore) -> list[Message]:
    """What the model is sent; forgets what does not fit.

    Raises:
      Full: the system prompt, the question and its latest step do not fit.
    """
    while self.limit is not None:
      if (used := self._tokens(system, tell)) <= self.limit:
        break
      lost = self._oldest()
      if not lost:
        raise Full(
          f'the question and its latest step have {used:,} tokens, memory '
          f'holds {self.limit:,}; give it more, or show less of tool outputs'
        )
      self._lose(lost, tell)
    return self._all(system)

  def _all(self, system: str) -> list[Message]:
    first = [{'role': 'system', 'content': system}] if system else []
    said = [message for unit in self.units for message in unit.messages]
    if self.summary:
      # With the next question, as templates want the roles in turns; never in
      # the system prompt: tools' outputs are in it too.
      note = f'<summary>\n{self.summary}\n</summary>\n\n'
      said[0] = {**said[0], 'content': note + said[0]['content']}
    return first + _in_turns(said)

  def _tokens(self, system: str, tell: Tell) -> int:
    return sum(self._of(message, tell) for message in self._all(system))

  def _of(self, message: Message, tell: Tell) -> int:
    parts = [message.get('content') or '']
    if message.get('tool_calls'):
      parts.append(json.dumps(message['tool_calls']))
    text = '\n'.join(parts)
    if text not in self._counted:
      self._counted[text] = self.count(text) + AROUND
      tell(Counted(digest(text), self._counted[text]))
    return self._counted[text]

  def _oldest(self) -> slice | None:
    """The units to lose next."""
    starts = [i for i, unit in enumerate(self.units) if unit.question]
    if len(starts) > 1:
      return slice(0, starts[1])
    if len(self.units) > 2:
      return slice(1, 2)
    return None

  def _lose(self, lost: slice, tell: Tell) -> None:
    messages = [m for unit in self.units[lost] for m in unit.messages]
    if self.summarise:
      earlier = [{'role': 'user', 'content': self.summary}]
      self.summary = self.summarise(
        [*(earlier if self.summary else []), *messages]
      )
    tell(Forgotten(messages, self.summary))
    del self.units[lost]


def _in_turns(messages: Sequence[Message]) -> list[Message]:
  """The user's messages in a row as one: templates want roles in turns."""
  made: list[Message] = []
  for message in messages:
    if made and message['role'] == made[-1]['role'] == 'user':
      joined = f'{made[-1]["content"]}\n\n{message["content"]}'
      made[-1] = {**made[-1], 'content': joined}
    else:
      made.append(message)
  return made


def digest(text: str) -> str:
  """What a trace calls a text that was counted."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class Tokens:
  """Counts a text's tokens: by the server's /tokenize, else by an estimate.

  Attributes:
    exact: whether the server counts; None before the first text.
  """

  def __init__(self, client: openai.OpenAI, model: str):
    """A server that is asked with the first text."""
    self.exact: bool | None = None
    self._client, self._model = client, model
    # /tokenize stands beside /v1, not below it.
    self._url = str(client.base_url).rstrip('/').removesuffix('/v1')

  def __call__(self, text: str) -> int:
    if not text:
      return 0
    if self.exact is not False:
      count = self._asked(text)
      if count is not None:
        self.exact = True
        return count
      self.exact = False
    return estimate(text)

  def _asked(self, text: str) -> int | None:
    body = {'model': self._model, 'prompt': text}
    try:
      answer = self._client.post(
        f'{self._url}/tokenize', cast_to=object, body=body
      )
    except openai.OpenAIError:
      return None
    if not isinstance(answer, dict):
      return None
    if isinstance(answer.get('count'), int):
      return answer['count']
    tokens = answer.get('tokens')
    return len(tokens) if isinstance(tokens, list) else None
