# SPDX-License-Identifier: Apache-2.0
"""A model as the agent asks it: a request's JSON in, a reply out."""

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
ChatModel = Callable[[Request, Callable[[str], None], float | None], ChatReply]


class ReplyError(ValueError):
  """A request without a reply; the sentence says what happened."""


class ReplyTimeout(ReplyError):
  """A reply that was not whole in time."""


# Of a server's reply: bytes, seconds, calls, and characters of its error.
_LARGEST, _LONGEST = 64 << 20, 3600.0
_CALLS, _SENTENCE = 128, 500
# Seconds for the body of an error, which no one waits for.
_ERROR_SECONDS = 60.0


class _BoundedStream(httpx.SyncByteStream):
  """A body that ends with an error after so many bytes or seconds."""

  def __init__(self, response: httpx.Response):
    self._stream, self._request = response.stream, response.request
    self._end = time.monotonic() + (
      _ERROR_SECONDS if response.is_error else _LONGEST
    )

  def __iter__(self) -> Iterator[bytes]:
    left = _LARGEST
    for data in self._stream:
      left -= len(data)
      if left < 0:
        fault = f'its reply is longer than {_LARGEST >> 20} MB'
        raise httpx.ReadError(fault, request=self._request)
      if time.monotonic() > self._end:
        raise httpx.ReadTimeout('its reply has no end', request=self._request)
      yield data

  def close(self) -> None:
    self._stream.close()


def _bound_stream(response: httpx.Response) -> None:
  if response.headers.get('content-encoding', 'identity') != 'identity':
    # A megabyte may unpack to a thousand; none was asked for.
    raise httpx.DecodingError(
      'its reply is compressed, which was not asked for',
      request=response.request,
    )
  response.stream = _BoundedStream(response)


def make_client(base_url: str, key: str = '') -> openai.OpenAI:
  """A client of a server that is not trusted: replies of any kind are bounded.

  Raises:
    ValueError: the address is none.
  """
  http = openai.DefaultHttpxClient(
    event_hooks={'response': [_bound_stream]},
    headers={'Accept-Encoding': 'identity'},
    # The conversation is for the server that was named, and for no other.
    follow_redirects=False,
  )
  try:
    # Where a server asks for no key the client still wants one.
    return openai.OpenAI(
      base_url=base_url, api_key=key or 'none', http_client=http
    )
  except httpx.InvalidURL as e:
    raise ValueError(f'{base_url!r} is no address of a server: {e}') from None


def list_models(client: openai.OpenAI) -> list[str]:
  """The names of a server's models.

  Raises:
    Failed: it does not say.
  """
  answer = _send(client, lambda: client.get('/models', cast_to=httpx.Response))
  try:
    rows = field(parse_json(answer.content), 'data', list)
    return [field(row, 'id', str) for row in rows]
  except Malformed as e:
    raise ReplyError(_malformed_reply(client, e)) from None


def _send(client: openai.OpenAI, ask: Callable[[], Any]) -> Any:
  """The result of a request; its errors are sentences."""
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
      f'{_shorten(message)}'
    ) from None
  except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as e:
    raise ReplyError(
      f'{client.base_url} gave no reply ({_shorten(e)}); is a server running '
      'there, as of python -m moepeft.serve?'
    ) from None
  except Malformed as e:
    raise ReplyError(_malformed_reply(client, e)) from None


def _malformed_reply(client: openai.OpenAI, fault: Exception) -> str:
  return (
    f'{client.base_url} gave no reply of the form of the OpenAI API: '
    f'{_shorten(fault)}'
  )


def _shorten(text: Any) -> str:
  text = ' '.join(str(text).split())
  return text if len(text) <= _SENTENCE else f'{text[:_SENTENCE]}...'


class ServerModel:
  """A model behind an OpenAI-compatible server."""

  def __init__(self, client: openai.OpenAI, name: str, stream: bool = True):
    """A model by its name; `stream` asks for the text piece by piece."""
    self.client, self.name, self.stream = client, name, stream

  def __call__(
    self,
    request: Request,
    on_text: Callable[[str], None],
    seconds: float | None = None,
  ) -> ChatReply:
    """Implements `Model`."""
    try:
      return _send(self.client, lambda: self._ask(request, on_text, seconds))
    except ReplyTimeout:
      if seconds is None:
        raise ReplyError('the server took too long to reply') from None
      raise ReplyTimeout(
        f'the model did not answer in {seconds:.3g} s'
      ) from None

  def _ask(self, request, on_text, seconds) -> ChatReply:
    client = self.client
    if seconds is not None:
      # A late request is not asked again.
      client = client.with_options(timeout=seconds, max_retries=0)
    create = client.chat.completions.with_streaming_response.create
    usage = {'stream_options': {'include_usage': True}} if self.stream else {}
    end = time.monotonic() + min(_LONGEST, seconds or math.inf)
    with create(
      **request, model=self.name, stream=self.stream, **usage
    ) as response:
      data = _until(response.iter_bytes(), end)
      if not self.stream:
        return _parse_reply(parse_json(b''.join(data)), request)
      return _parse_reply(_merge_chunks(_events(data), on_text), request)


def _until(pieces: Iterable[bytes], end: float) -> Iterator[bytes]:
  """Bytes until a time; the client's own limit is of the time between two."""
  left = _LARGEST
  for data in pieces:
    if time.monotonic() > end:
      raise ReplyTimeout('the reply did not end in time')
    left -= len(data)
    if left < 0:
      raise Malformed(f'it is longer than {_LARGEST >> 20} MB')
    yield data


def _events(pieces: Iterable[bytes]) -> Iterator[Any]:
  """The JSON values of a stream of server-sent events."""
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
  """The pieces of a reply as the whole that they are of."""
  texts, calls = [], {}
  reason, usage, started = None, None, False
  for chunk in chunks:
    if error := field(chunk, 'error', dict, {}):
      raise Malformed(field(error, 'message', str, 'an error'))
    usage = field(chunk, 'usage', dict, usage)
    for choice in field(chunk, 'choices', list, [])[:1]:
      started = True
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
  return {'choices': [choice] if started else [], 'usage': usage}


def _merge_tool_call(calls: dict[int, dict], part: Any) -> None:
  index = field(part, 'index', int, 0)
  if not 0 <= index < _CALLS:
    raise Malformed(f"expected 'index' of 0 to {_CALLS - 1}, got {index}")
  call = calls.setdefault(index, {'id': '', 'name': '', 'arguments': []})
  function = field(part, 'function', dict, {})
  # A name comes at once; some servers say it again with each piece.
  call['id'] = call['id'] or field(part, 'id', str, '')
  call['name'] = call['name'] or field(function, 'name', str, '')
  call['arguments'].append(field(function, 'arguments', str, ''))


def _parse_reply(answer: Any, request: Request) -> ChatReply:
  choices = field(answer, 'choices', list, [])
  if not choices:
    raise ReplyError('the server gave no reply: it has no choices')
  message = field(choices[0], 'message', dict)
  reason = field(choices[0], 'finish_reason', str, '') or 'stop'
  requested = field(message, 'tool_calls', list, [])
  if len(requested) > _CALLS:
    raise Malformed(
      f'it calls {len(requested):,} tools, {_CALLS} at most are run'
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
    for i, call in enumerate(requested)
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
  """About how many tokens a request's messages and tools are.

  A token for each 3 bytes of UTF-8: English has about 4 letters a token, other
  scripts fewer. A guess that is too large keeps a budget, one that is too
  small breaks it.
  """
  return sum(
    map(_estimate_part, [*request['messages'], *request.get('tools', ())])
  )


def _estimate_part(part: Message) -> int:
  # With what a chat template puts around a message, about.
  return 8 + math.ceil(len(str(part).encode()) / 3)
