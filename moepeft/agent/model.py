# SPDX-License-Identifier: Apache-2.0
"""A model as the agent asks it: a request's JSON in, a reply out."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import openai


@dataclasses.dataclass(frozen=True)
class Call:
  """A tool call that a model asks for; arguments are JSON text, unchecked."""

  id: str
  name: str
  arguments: str


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a model says.

  Attributes:
    text: its words; '' where it only calls.
    calls: tools that it wants called.
    reason: why it ended: 'stop', 'length', 'tool_calls' ...
    tokens: of the prompt and the answer together.
    estimated: whether `tokens` is a guess, as the server did not say.
  """

  text: str
  calls: tuple[Call, ...] = ()
  reason: str = 'stop'
  tokens: int = 0
  estimated: bool = False


class Failed(ValueError):
  """A request without a reply; the sentence says what happened."""


class Late(Failed):
  """A reply that was not whole in time."""


class Model(Protocol):
  """Anything that answers requests."""

  def __call__(
    self,
    request: Mapping[str, Any],
    piece: Callable[[str], None],
    seconds: float | None,
  ) -> Reply:
    """Asks and waits.

    Args:
      request: the body of chat completions but for the model's name.
      piece: called with each piece of the text as it comes.
      seconds: that the reply may take; None for no limit.

    Raises:
      Failed: there is no reply. Late: not in time.
    """


class Served:
  """A model behind an OpenAI-compatible server."""

  def __init__(self, client: openai.OpenAI, name: str, stream: bool = True):
    """A model by its name; `stream` asks for the text piece by piece."""
    self.client, self.name, self.stream = client, name, stream

  def __call__(self, request, piece, seconds) -> Reply:
    client = self.client
    if seconds is not None:
      # A late request is not asked again.
      client = client.with_options(timeout=seconds, max_retries=0)
    body = {**request, 'model': self.name}
    try:
      if not self.stream:
        return _whole(client.chat.completions.create(**body), request)
      return _streamed(client, body, piece, seconds)
    except openai.APITimeoutError as e:
      if seconds is None:
        raise Failed(_unreached(self.client, e)) from None
      raise Late(f'the model did not answer in {seconds:.3g} s') from None
    except openai.APIConnectionError as e:
      raise Failed(_unreached(self.client, e)) from None
    except openai.APIStatusError as e:
      raise Failed(
        f'the server refused the request (HTTP {e.status_code}): {_said(e)}'
      ) from None
    except openai.OpenAIError as e:
      raise Failed(f'the server gave no reply: {e}') from None


def _unreached(client: openai.OpenAI, error: Exception) -> str:
  return (
    f'no server answers at {client.base_url} ({error}); start one, as with '
    'python -m moepeft.serve, or name another with --base_url'
  )


def _said(error: openai.APIStatusError) -> str:
  body = error.body
  if isinstance(body, dict) and isinstance(body.get('message'), str):
    return body['message']
  return str(error.message)


def _whole(answer: Any, request: Mapping[str, Any]) -> Reply:
  if not getattr(answer, 'choices', None):
    raise Failed('the server gave no reply: it has no choices')
  choice = answer.choices[0]
  calls = tuple(
    Call(call.id or f'call_{i}', call.function.name, call.function.arguments)
    for i, call in enumerate(choice.message.tool_calls or ())
    if getattr(call, 'function', None)
  )
  text = choice.message.content or ''
  used = answer.usage.total_tokens if answer.usage else None
  return _counted(text, calls, choice.finish_reason, used, request)


def _streamed(
  client: openai.OpenAI,
  body: Mapping[str, Any],
  piece: Callable[[str], None],
  seconds: float | None,
) -> Reply:
  begun = time.monotonic()
  texts, parts, reason, used = [], {}, '', None
  options = {'include_usage': True}
  with client.chat.completions.create(
    **body, stream=True, stream_options=options
  ) as chunks:
    for chunk in chunks:
      # The client's own limit is of the time between two chunks.
      if seconds is not None and time.monotonic() - begun > seconds:
        raise Late(f'the model did not end in {seconds:.3g} s')
      used = chunk.usage.total_tokens if chunk.usage else used
      for choice in chunk.choices[:1]:
        reason = choice.finish_reason or reason
        if choice.delta.content:
          texts.append(choice.delta.content)
          piece(choice.delta.content)
        for delta in choice.delta.tool_calls or ():
          _join(parts.setdefault(delta.index, ['', '', '']), delta)
  if not (reason or texts or parts):
    raise Failed('the server gave no reply: its stream is empty')
  calls = tuple(
    Call(own[0] or f'call_{i}', own[1], own[2])
    for i, own in sorted(parts.items())
  )
  return _counted(''.join(texts), calls, reason, used, body)


def _join(own: list[str], delta: Any) -> None:
  """Adds a piece of a call to [id, name, arguments]."""
  own[0] = delta.id or own[0]
  if delta.function:
    own[1] += delta.function.name or ''
    own[2] += delta.function.arguments or ''


def _counted(
  text: str,
  calls: tuple[Call, ...],
  reason: str | None,
  used: int | None,
  request: Mapping[str, Any],
) -> Reply:
  if used is not None:
    return Reply(text, calls, reason or 'stop', used)
  asked = sum(estimate(str(m)) for m in request['messages'])
  said = estimate(text + ''.join(call.arguments for call in calls))
  return Reply(text, calls, reason or 'stop', asked + said, True)


def estimate(text: str) -> int:
  """About how many tokens a text is: a token for each 3 bytes of UTF-8.

  English has about 4 letters a token, other scripts fewer; a guess that is
  too large keeps a budget, one that is too small breaks it.
  """
  return -(-len(text.encode()) // 3)
