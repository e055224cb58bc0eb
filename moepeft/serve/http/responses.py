# SPDX-License-Identifier: Apache-2.0
"""POST /v1/responses: a chat in the form of OpenAI's Responses API."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moepeft.serve.http import chat, logprobs
from moepeft.serve.http.body import read_body
from moepeft.serve.http.completion_stream import (
  FINISH_REASONS,
  AnswerDelta,
  answer_deltas,
)
from moepeft.serve.http.errors import ApiError, server_error
from moepeft.serve.http.generation import respond
from moepeft.serve.http.request_stats import RequestStats
from moepeft.serve.http.responses_body import ResponsesBody, rename_fields
from moepeft.serve.http.service import Service

_LOG = logging.getLogger('moepeft.serve')
Json = dict[str, Any]


async def responses(service: Service, request: Request) -> Response:
  """The answer to a conversation, as in OpenAI's Responses API."""
  body = await read_body(request, ResponsesBody, service.limits.body)
  name = f'resp_{secrets.token_hex(24)}'
  chat_body = await asyncio.to_thread(body.to_chat)
  try:
    started = await chat.start(service, request, chat_body, name)
  except ApiError as e:
    raise rename_fields(e) from None
  builder = ResponseBuilder(body, started)

  async def complete() -> Json:
    (delta,) = await started.request.complete(
      started.engine_requests, started.answers
    )
    return await asyncio.to_thread(_whole, builder, delta)

  events = _stream(builder, started) if body.stream else None
  return await respond(
    request, started.engine_requests, events, complete, typed=True
  )


def _whole(builder: 'ResponseBuilder', delta: AnswerDelta) -> Json:
  builder.feed(delta)
  return builder.response()


async def _stream(
  builder: 'ResponseBuilder', started: chat.StartedChat
) -> AsyncGenerator[Json, None]:
  """Yields the events of a response."""
  count = 0

  def number(event: Json) -> Json:
    nonlocal count
    count += 1
    return event | {'sequence_number': count - 1}

  for kind in ('response.created', 'response.in_progress'):
    yield number({'type': kind, 'response': builder.response()})
  try:
    async for batch in answer_deltas(
      started.engine_requests, started.answers, started.request.stats
    ):
      for _, delta in batch:
        for event in builder.feed(delta):
          yield number(event)
  except (asyncio.CancelledError, OSError):
    raise
  except Exception as e:
    if not isinstance(e, ApiError):
      _LOG.exception('a response failed')
      e = server_error("the server failed; see the server's log")
    builder.fail(e)
  kind = f'response.{builder.status}'
  yield number({'type': kind, 'response': builder.response()})


class ResponseBuilder:
  """The items of a response, and the events of their growth.

  Attributes:
    status: 'in_progress', 'completed', 'incomplete' or 'failed'.
  """

  def __init__(self, body: ResponsesBody, started: chat.StartedChat):
    self._body, self._chat = body, started.request
    (self._reader,) = started.request.make_readers()
    self._output: list[Json] = []
    self._error: Json | None = None
    self.status = 'in_progress'

  def feed(self, delta: AnswerDelta) -> list[Json]:
    """Adds a part of the answer, and returns its events."""
    parts = self._reader.feed(delta.text) if delta.text else []
    if delta.reason:
      parts += self._reader.finish()
    scores = self._logprobs(delta)
    if scores and not any('content' in part for part in parts):
      # Tokens are reported although their text is withheld.
      parts = [{'content': ''}, *parts] if self._is_text() else parts
    events: list[Json] = []
    for part in parts:
      if 'content' in part:
        events += self._add_text(part['content'], scores)
        scores = []
      for call in part.get('tool_calls', ()):
        events += self._add_call(call)
    if delta.reason:
      events += self._finish(delta.reason)
    return events

  def fail(self, error: ApiError) -> None:
    code = 'server_error' if error.status >= 500 else 'invalid_prompt'
    self._error = {'code': code, 'message': error.message}
    self.status = 'failed'

  def response(self) -> Json:
    """The response so far."""
    body, chat_request = self._body, self._chat
    incomplete = {'reason': 'max_output_tokens'}
    tools = [
      tool.model_dump() | {'strict': bool(tool.strict)}
      for tool in body.tools or ()
    ]
    text_format = body.format.model_dump(by_alias=True, exclude_unset=True)
    response = {
      'id': chat_request.id,
      'object': 'response',
      'created_at': chat_request.created,
      'status': self.status,
      'error': self._error,
      'incomplete_details': (
        incomplete if self.status == 'incomplete' else None
      ),
      'instructions': body.instructions,
      'max_output_tokens': body.max_output_tokens,
      'model': chat_request.model.name,
      'output': list(self._output),
      'parallel_tool_calls': body.parallel_tool_calls is not False,
      'previous_response_id': None,
      # Nothing is stored, and a later request cannot refer to it.
      'store': False,
      'temperature': 1.0 if body.temperature is None else body.temperature,
      'text': {'format': text_format},
      'tool_choice': body.tool_choice or 'auto',
      'tools': tools,
      'top_logprobs': body.top_logprobs or 0,
      'top_p': 1.0 if body.top_p is None else body.top_p,
      'truncation': 'disabled',
      'metadata': body.metadata or {},
      'user': body.user,
      'usage': None,
    }
    if self.status != 'in_progress':
      response['usage'] = _usage(chat_request.stats)
    return response | chat_request.auto_fields()

  def _is_text(self) -> bool:
    return not self._output or self._output[-1]['type'] == 'message'

  def _logprobs(self, delta: AnswerDelta) -> list[Json]:
    if not self._body.reports_logprobs:
      return []
    tokenizer = self._chat.service.tokenizer
    top = self._body.top_logprobs or 0
    return logprobs.chat_logprobs(tokenizer, delta.entries, top)['content']

  def _event(self, kind: str, **fields: Any) -> Json:
    """An event of the last item, or of the text in it."""
    event = {'type': kind, 'output_index': len(self._output) - 1}
    if 'item' not in fields:
      event['item_id'] = self._output[-1]['id']
    if kind.startswith(('response.output_text', 'response.content_part')):
      event['content_index'] = 0
    return event | fields

  def _open_item(self, item: Json) -> list[Json]:
    events = self._close_item('completed')
    self._output.append(item | {'status': 'in_progress'})
    copy = dict(self._output[-1])
    return [*events, self._event('response.output_item.added', item=copy)]

  def _close_item(self, status: str) -> list[Json]:
    """Ends the last item, if it has not ended."""
    if not self._output or self._output[-1]['status'] != 'in_progress':
      return []
    item = self._output[-1] = self._output[-1] | {'status': status}
    if item['type'] == 'message':
      (part,) = item['content']
      text, scores = part['text'], part['logprobs']
      events = [
        self._event('response.output_text.done', text=text, logprobs=scores),
        self._event('response.content_part.done', part=part),
      ]
    else:
      kind = 'response.function_call_arguments.done'
      arguments, name = item['arguments'], item['name']
      events = [self._event(kind, arguments=arguments, name=name)]
    return [*events, self._event('response.output_item.done', item=item)]

  def _add_text(self, text: str, scores: list[Json]) -> list[Json]:
    events = []
    is_open = self._output and self._output[-1]['type'] == 'message'
    if not is_open:
      item = {
        'id': f'msg_{secrets.token_hex(24)}',
        'type': 'message',
        'role': 'assistant',
        'content': [],
      }
      events = self._open_item(item)
      part = {
        'type': 'output_text',
        'text': '',
        'annotations': [],
        'logprobs': [],
      }
      self._output[-1]['content'] = [part]
      events.append(self._event('response.content_part.added', part=dict(part)))
    (part,) = self._output[-1]['content']
    part |= {
      'text': part['text'] + text,
      'logprobs': [*part['logprobs'], *scores],
    }
    kind = 'response.output_text.delta'
    return [*events, self._event(kind, delta=text, logprobs=scores)]

  def _add_call(self, call: Json) -> list[Json]:
    """Adds a delta of a tool call in the form of a chat."""
    events, function = [], call['function']
    if 'id' in call:
      events = self._open_item(
        {
          'id': f'fc_{secrets.token_hex(24)}',
          'type': 'function_call',
          'call_id': call['id'],
          'name': function['name'],
          'arguments': '',
        }
      )
    arguments = function['arguments']
    if arguments:
      self._output[-1]['arguments'] += arguments
      kind = 'response.function_call_arguments.delta'
      events.append(self._event(kind, delta=arguments))
    return events

  def _finish(self, reason: str) -> list[Json]:
    # An answer without a token is an empty text.
    events = [] if self._output else self._add_text('', [])
    complete = FINISH_REASONS[reason] == 'stop'
    self.status = 'completed' if complete else 'incomplete'
    return [*events, *self._close_item(self.status)]


def _usage(stats: RequestStats) -> Json:
  return {
    'input_tokens': stats.prompt,
    'input_tokens_details': {
      'cached_tokens': min(stats.cached, stats.prompt),
      'cache_write_tokens': 0,
    },
    'output_tokens': stats.answer,
    'output_tokens_details': {'reasoning_tokens': 0},
    'total_tokens': stats.prompt + stats.answer,
  }
