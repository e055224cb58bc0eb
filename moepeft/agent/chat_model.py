# SPDX-License-Identifier: Apache-2.0
"""A client of chat models: a request's JSON in, a reply out."""

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import openai

from moepeft.core.untrusted import Malformed, field, parse_json

# The HTTP library of the client: httpx, or httpx2 in its later versions.
_LIBRARY = openai.DefaultHttpxClient.__base__.__module__.partition('.')[0]
httpx = importlib.import_module(_LIBRARY)

Message = Mapping[str, Any]
Request = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChatReply:
  """The reply of a model.

  Attributes:
    message: role, content and tool_calls.
    reason: the finish reason: 'stop', 'length', 'tool_calls', ...
    tokens: the number of tokens of prompt and answer together.
    estimated: whether `tokens` is an estimate, as the server did not count.
  """

  message: Message
  reason: str = 'stop'
  tokens: int = 0
  estimated: bool = False


# (request, callback for pieces of text, time limit in seconds) -> reply; raises
# a ReplyError if there is none.
ChatModel = Callable[[Request, Callable[[str], None], float | None], ChatReply]


class ReplyError(ValueError):
  """The server gave no valid reply."""


class ReplyTimeout(ReplyError):
  """The reply was not complete in time."""


# Limits of a reply: bytes, seconds, tool calls, and characters of its error.
_MAX_BYTES, _MAX_SECONDS = 64 << 20, 3600.0
_MAX_CALLS, _MAX_ERROR_LENGTH = 128, 500
# A shorter time limit for the body of an error.
_ERROR_SECONDS = 60.0
_KEY_HINT = '; set OPENAI_API_KEY to a key of this server'


class _BoundedStream(httpx.SyncByteStream):
  """A response body that raises beyond the limits of bytes or seconds."""

  def __init__(self, response: httpx.Response):
    self._stream, self._request = response.stream, response.request
    self._end = time.monotonic() + (
      _ERROR_SECONDS if response.is_error else _MAX_SECONDS
    )

  def __iter__(self) -> Iterator[bytes]:
    remaining = _MAX_BYTES
    for data in self._stream:
      remaining -= len(data)
      if remaining < 0:
        problem = f'its reply is longer than {_MAX_BYTES >> 20} MB'
        raise httpx.ReadError(problem, request=self._request)
      if time.monotonic() > self._end:
        raise httpx.ReadTimeout('its reply has no end', request=self._request)
      yield data

  def close(self) -> None:
    self._stream.close()


def _bound_stream(response: httpx.Response) -> None:
  if response.headers.get('content-encoding', 'identity') != 'identity':
    # A compressed megabyte may expand to gigabytes.
    raise httpx.DecodingError(
      'its reply is compressed, which was not asked for',
      request=response.request,
    )
  response.stream = _BoundedStream(response)


def make_client(base_url: str, key: str = '') -> openai.OpenAI:
  """Makes a client of an untrusted server; all replies have limits.

  Raises:
    ValueError: the address is invalid.
  """
  http_client = openai.DefaultHttpxClient(
    event_hooks={'response': [_bound_stream]},
    headers={'Accept-Encoding': 'identity'},
    # A redirect would send the conversation to another server.
    follow_redirects=False,
  )
  try:
    # The client requires a key, even if the server does not.
    return openai.OpenAI(
      base_url=base_url, api_key=key or 'none', http_client=http_client
    )
  except httpx.InvalidURL as e:
    raise ValueError(
      f'{base_url!r} is not the address of a server: {e}'
    ) from None


def list_models(client: openai.OpenAI) -> list[str]:
  """The names of a server's models.

  Raises:
    ReplyError: the server does not list them.
  """
  answer = send(client, lambda: client.get('/models', cast_to=httpx.Response))
  try:
    rows = field(parse_json(answer.content), 'data', list)
    return [field(row, 'id', str) for row in rows]
  except Malformed as e:
    raise ReplyError(_malformed_reply(client, e)) from None


def send(client: openai.OpenAI, ask: Callable[[], Any]) -> Any:
  """Sends a request.

  Args:
    ask: calls the client.

  Raises:
    ReplyError: there is no valid reply; the message is for the user.
  """
  try:
    return ask()
  except (openai.APITimeoutError, httpx.TimeoutException):
    raise ReplyTimeout('the server took too long to reply') from None
  except openai.APIStatusError as e:
    body = e.body if isinstance(e.body, dict) else {}
    message = body.get('message')
    message = message if isinstance(message, str) and message else e.message
    raise ReplyError(
      f'the server refused the request (HTTP {e.status_code}): '
      f'{_shorten(message)}{_KEY_HINT * (e.status_code == 401)}'
    ) from None
  except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
    raise ReplyError(
      f'{client.base_url} gave no reply ({_shorten(e)}); is a server running '
      'there, for example python -m moepeft.serve?'
    ) from None
  except Malformed as e:
    raise ReplyError(_malformed_reply(client, e)) from None


def _malformed_reply(client: openai.OpenAI, problem: Exception) -> str:
  return (
    f'{client.base_url} gave no reply in the format of the OpenAI API: '
    f'{_shorten(problem)}'
  )


def _shorten(text: Any) -> str:
  text = ' '.join(str(text).split())
  return (
    text if len(text) <= _MAX_ERROR_LENGTH else f'{text[:_MAX_ERROR_LENGTH]}...'
  )


class ServerModel:
  """A model behind an OpenAI-compatible server."""

  def __init__(self, client: openai.OpenAI, name: str, stream: bool = True):
    """`stream`: whether to request the text in pieces."""
    self.client, self.name, self.stream = client, name, stream

  def __call__(
    self,
    request: Request,
    on_text: Callable[[str], None],
    seconds: float | None = None,
  ) -> ChatReply:
    """Implements `ChatModel`."""
    try:
      return send(self.client, lambda: self._ask(request, on_text, seconds))
    except ReplyTimeout:
      if seconds is None:
        raise ReplyError('the server took too long to reply') from None
      raise ReplyTimeout(
        f'the model did not answer in {seconds:.3g} s'
      ) from None

  def _ask(self, request, on_text, seconds) -> ChatReply:
    client = self.client
    if seconds is not None:
      # No retries, as they would exceed the time limit.
      client = client.with_options(timeout=seconds, max_retries=0)
    create = client.chat.completions.with_streaming_response.create
    usage = {'stream_options': {'include_usage': True}} if self.stream else {}
    end = time.monotonic() + min(_MAX_SECONDS, seconds or math.inf)
    with create(
      **request, model=self.name, stream=self.stream, **usage
    ) as response:
      data = _limit_bytes(response.iter_bytes(), end)
      if not self.stream:
        return _parse_reply(parse_json(b''.join(data)), request)
      return _parse_reply(_merge_chunks(_events(data), on_text), request)


def choose_model(
  client: openai.OpenAI, name: str = '', stream: bool = False
) -> ServerModel:
  """The model of a name, or the server's first one.

  Raises:
    ReplyError: the server does not list its models, or has none.
  """
  if not name:
    names = list_models(client)
    if not names:
      raise ReplyError(f'the server at {client.base_url} has no model')
    name = names[0]
  return ServerModel(client, name, stream)


def _limit_bytes(pieces: Iterable[bytes], end: float) -> Iterator[bytes]:
  """Limits bytes and total time; the client only limits time between pieces."""
  remaining = _MAX_BYTES
  for data in pieces:
    if time.monotonic() > end:
      raise ReplyTimeout('the reply did not end in time')
    remaining -= len(data)
    if remaining < 0:
      raise Malformed(f'it is longer than {_MAX_BYTES >> 20} MB')
    yield data


def _events(pieces: Iterable[bytes]) -> Iterator[Any]:
  """Yields the JSON values of a stream of server-sent events."""
  line_parts: list[bytes] = []
  for data in pieces:
    *lines, rest = data.split(b'\n')
    for line in lines:
      line, line_parts = b''.join([*line_parts, line]).strip(), []
      if line == b'data: [DONE]':
        return
      if line.startswith(b'data:'):
        yield parse_json(line.removeprefix(b'data:'))
    line_parts.append(rest)


def _merge_chunks(
  chunks: Iterable[Any], on_text: Callable[[str], None]
) -> Mapping:
  """Merges the chunks of a streamed reply."""
  texts, calls = [], {}
  reason, usage, has_choice = None, None, False
  for chunk in chunks:
    if error := field(chunk, 'error', dict, {}):
      raise Malformed(field(error, 'message', str, 'an error'))
    usage = field(chunk, 'usage', dict, usage)
    for choice in field(chunk, 'choices', list, [])[:1]:
      has_choice = True
      reason = field(choice, 'finish_reason', str, reason)
      delta = field(choice, 'delta', dict, {})
      if text := field(delta, 'content', str, ''):
        texts.append(text)
        on_text(text)
      for part in field(delta, 'tool_calls', list, []):
        _merge_tool_call(calls, part)
  merged = [
    {
      'id': call['id'],
      'function': {
        'name': call['name'],
        'arguments': ''.join(call['arguments']),
      },
    }
    for _, call in sorted(calls.items())
  ]
  message = {'content': ''.join(texts), 'tool_calls': merged}
  choice = {'message': message, 'finish_reason': reason}
  return {'choices': [choice] if has_choice else [], 'usage': usage}


def _merge_tool_call(calls: dict[int, dict], part: Any) -> None:
  index = field(part, 'index', int, 0)
  if not 0 <= index < _MAX_CALLS:
    raise Malformed(f"expected 'index' of 0 to {_MAX_CALLS - 1}, got {index}")
  call = calls.setdefault(index, {'id': '', 'name': '', 'arguments': []})
  function = field(part, 'function', dict, {})
  # A name is never split; some servers repeat it in each chunk.
  call['id'] = call['id'] or field(part, 'id', str, '')
  call['name'] = call['name'] or field(function, 'name', str, '')
  call['arguments'].append(field(function, 'arguments', str, ''))


def _parse_reply(answer: Any, request: Request) -> ChatReply:
  choices = field(answer, 'choices', list, [])
  if not choices:
    raise ReplyError('the server gave no reply: it has no choices')
  message = field(choices[0], 'message', dict)
  reason = field(choices[0], 'finish_reason', str, '') or 'stop'
  stored_calls = field(message, 'tool_calls', list, [])
  if len(stored_calls) > _MAX_CALLS:
    raise Malformed(
      f'it has {len(stored_calls):,} tool calls, the maximum is {_MAX_CALLS}'
    )
  calls = [
    {
      'id': field(call, 'id', str, '') or f'call_{i}',
      'type': 'function',
      'function': {
        'name': field(call, 'function.name', str),
        'arguments': field(call, 'function.arguments', str, ''),
      },
    }
    for i, call in enumerate(stored_calls)
  ]
  message_dict: Message = {
    'role': 'assistant',
    'content': field(message, 'content', str, ''),
  }
  message_dict = (
    {**message_dict, 'tool_calls': calls} if calls else message_dict
  )
  usage = field(answer, 'usage', dict, {})
  if (tokens := field(usage, 'total_tokens', int, -1)) >= 0:
    return ChatReply(message_dict, reason, tokens)
  return ChatReply(
    message_dict,
    reason,
    estimate_tokens(request) + _estimate_part(message_dict),
    True,
  )


def estimate_tokens(request: Request) -> int:
  """Estimates the number of tokens of a request's messages and tools.

  One token per 3 bytes of UTF-8: English has about 4 letters per token, other
  scripts fewer. A high estimate keeps a budget, a low one exceeds it.
  """
  return sum(
    map(_estimate_part, [*request['messages'], *request.get('tools', ())])
  )


def _estimate_part(part: Message) -> int:
  # 8 tokens are for the chat template.
  return 8 + math.ceil(len(str(part).encode()) / 3)
