# SPDX-License-Identifier: Apache-2.0
"""A model as the agent asks it: a request's JSON in, a reply out."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import openai
from openai.lib.streaming.chat import ChatCompletionStreamState

Message = Mapping[str, Any]
Request = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a model says.

  Attributes:
    message: as the conversation keeps it: role, content, tool_calls.
    reason: why it ended: 'stop', 'length', 'tool_calls' ...
    tokens: of the prompt and the answer together.
    estimated: whether `tokens` is a guess, as the server did not say.
  """

  message: Message
  reason: str = 'stop'
  tokens: int = 0
  estimated: bool = False


# (request, called with each piece of text, seconds that it may take) -> reply;
# raises Failed where there is none.
Model = Callable[[Request, Callable[[str], None], float | None], Reply]


class Failed(ValueError):
  """A request without a reply; the sentence says what happened."""


class Late(Failed):
  """A reply that was not whole in time."""


class Served:
  """A model behind an OpenAI-compatible server."""

  def __init__(self, client: openai.OpenAI, name: str, stream: bool = True):
    """A model by its name; `stream` asks for the text piece by piece."""
    self.client, self.name, self.stream = client, name, stream

  def __call__(
    self,
    request: Request,
    piece: Callable[[str], None],
    seconds: float | None = None,
  ) -> Reply:
    """Implements `Model`."""
    try:
      return self._ask(request, piece, seconds)
    except openai.APITimeoutError:
      if seconds is None:
        raise Failed('the server took too long to reply') from None
      raise Late(f'the model did not answer in {seconds:.3g} s') from None
    except openai.APIStatusError as e:
      body = e.body if isinstance(e.body, dict) else {}
      raise Failed(
        f'the server refused the request (HTTP {e.status_code}): '
        f'{body.get("message") or e.message}'
      ) from None
    except openai.OpenAIError as e:
      raise Failed(
        f'{self.client.base_url} gave no reply ({e}); is a server running '
        'there, as of python -m moepeft.serve?'
      ) from None

  def _ask(self, request, piece, seconds) -> Reply:
    client = self.client
    if seconds is not None:
      # A late request is not asked again.
      client = client.with_options(timeout=seconds, max_retries=0)
    create = client.chat.completions.create
    if not self.stream:
      return _reply(create(**request, model=self.name), request)
    end = time.monotonic() + (math.inf if seconds is None else seconds)
    state, usage = ChatCompletionStreamState(), {'include_usage': True}
    last = None
    with create(
      **request, model=self.name, stream=True, stream_options=usage
    ) as chunks:
      for chunk in chunks:
        # The client's own limit is of the time between two chunks.
        if time.monotonic() > end:
          raise Late(f'the model did not end in {seconds:.3g} s')
        for event in state.handle_chunk(chunk):
          if event.type == 'content.delta' and event.delta:
            piece(event.delta)
        last = state.current_completion_snapshot
    return _reply(last, request)


def _reply(answer: Any, request: Request) -> Reply:
  if not getattr(answer, 'choices', None):
    raise Failed('the server gave no reply: it has no choices')
  said, reason = answer.choices[0].message, answer.choices[0].finish_reason
  message = {'role': 'assistant', 'content': said.content or ''}
  calls = [
    {
      'id': call.id or f'call_{i}',
      'type': 'function',
      'function': {
        'name': call.function.name,
        'arguments': call.function.arguments or '',
      },
    }
    for i, call in enumerate(said.tool_calls or ())
    if getattr(call, 'function', None)
  ]
  message |= {'tool_calls': calls} if calls else {}
  if answer.usage:
    return Reply(message, reason or 'stop', answer.usage.total_tokens)
  guess = estimate(request) + _guess(message)
  return Reply(message, reason or 'stop', guess, True)


def estimate(request: Request) -> int:
  """About how many tokens a request's messages and tools are.

  A token for each 3 bytes of UTF-8: English has about 4 letters a token, other
  scripts fewer. A guess that is too large keeps a budget, one that is too
  small breaks it.
  """
  return sum(map(_guess, [*request['messages'], *request.get('tools', ())]))


def _guess(part: Message) -> int:
  # With what a chat template puts around a message, about.
  return 8 + math.ceil(len(str(part).encode()) / 3)
