# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.inference import api
from moepeft.serve.http import logprobs
from moepeft.serve.http import requests as http_requests
from moepeft.serve.http.body import read
from moepeft.serve.http.completion_stream import (
  FINISH_REASONS,
  AnswerDelta,
  AnswerStream,
  answer_deltas,
)
from moepeft.serve.http.errors import invalid_request
from moepeft.serve.http.event_bridge import ClientRequests, cancel_on_disconnect
from moepeft.serve.http.model_registry import RegisteredModel
from moepeft.serve.http.request_stats import RequestStats, usage
from moepeft.serve.http.schemas import Chat
from moepeft.serve.http.service import Service
from moepeft.serve.http.sse import EventStream
from moepeft.serve.http.tool_calls import (
  ContentReader,
  ToolCallReader,
  ToolPlan,
  assistant_message,
)


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  """One request for a turn of the assistant.

  Attributes:
    plan: of its tools, None where there are none.
    id: of the completion.
    created: Unix time.
    eos_token_ids: ids that end an answer.
  """

  service: Service
  body: Chat
  model: RegisteredModel
  plan: ToolPlan | None
  stats: RequestStats
  id: str
  created: int
  eos_token_ids: tuple[int, ...]

  def head(self, kind: str) -> dict[str, Any]:
    """The fields that a response and each chunk of a stream begin with."""
    return {
      'id': self.id,
      'object': kind,
      'created': self.created,
      'model': self.model.name,
      'system_fingerprint': self.model.fingerprint,
    }


async def chat(service: Service, request: Request) -> Response:
  stats = request.scope['stats']
  body = await read(request, Chat, service.limits.body)
  _check(body)
  http_requests.check_choices(body.n, service.limits)
  model = service.find(body.model)
  stats.model = model.name
  name = f'chatcmpl-{secrets.token_hex(12)}'
  plan = await asyncio.to_thread(
    make_tool_plan,
    service,
    model,
    body.tools,
    body.tool_choice,
    body.parallel_tool_calls is not False,
  )
  tokenizer, now = service.tokenizer, int(time.time())
  eos_token_ids = await tokenizer.run_in_thread(
    tokenizer.eos_token_ids_for, model.chat_settings
  )
  chat_request = ChatRequest(
    service, body, model, plan, stats, name, now, eos_token_ids
  )
  ids = await tokenizer.run_in_thread(
    tokenizer.encode_chat, body.messages, model.chat_settings, plan
  )
  stats.prompt = len(ids)
  requests = await asyncio.to_thread(_engine_requests, chat_request, ids)
  engine_requests = http_requests.submit(service.engine, requests, 'messages')
  if body.stream:
    return EventStream(
      _stream(chat_request, engine_requests), engine_requests.close
    )
  try:
    whole = await cancel_on_disconnect(
      request.receive, _whole(chat_request, engine_requests)
    )
  finally:
    engine_requests.close()
  return JSONResponse(whole)


def _check(body: Chat) -> None:
  if body.top_logprobs and not body.logprobs:
    raise invalid_request('top_logprobs needs logprobs=true', 'top_logprobs')
  if body.stream_options and not body.stream:
    raise invalid_request('stream_options needs stream=true', 'stream_options')


def make_tool_plan(
  service: Service,
  model: RegisteredModel,
  tools: list | None,
  choice: Any,
  parallel: bool,
) -> ToolPlan | None:
  """The plan for OpenAI's tools and tool_choice; None without tools.

  Raises:
    ApiError: they are wrong.
  """
  if not tools:
    if choice not in (None, 'none', 'auto'):
      raise invalid_request('tool_choice needs tools', 'tool_choice')
    return None
  if service.tool_planner is None:
    raise invalid_request(
      'this server does not call tools; leave them out', 'tools'
    )
  template = service.tokenizer.chat_template(model.chat_settings)
  return service.tool_planner.plan(tools, choice, parallel, template)


def _constraint(chat_request: ChatRequest) -> api.Constraint | None:
  plan, response_format = chat_request.plan, chat_request.body.response_format
  if plan is None:
    return http_requests.constraint(
      response_format, chat_request.service.compiler
    )
  if (
    response_format is not None
    and response_format.type != 'text'
    and plan.may_be_text
  ):
    raise invalid_request(
      'response_format and tools that need not be called cannot both be kept; '
      "leave one out, or set tool_choice to 'required'",
      'response_format',
    )
  return plan.constraint()


def _engine_requests(
  chat_request: ChatRequest, ids: Sequence[int]
) -> list[api.Request]:
  """An answer's question each."""
  service, body = chat_request.service, chat_request.body
  length = http_requests.answer_length(
    body.length,
    None,
    len(ids),
    service.engine,
    service.limits,
    'messages',
    chat_request.model.before,
  )
  return [
    api.Request(
      f'{chat_request.id}/{i}',
      tuple(ids),
      length,
      chat_request.model.adapter,
      http_requests.sampling(body),
      seed,
      chat_request.eos_token_ids,
      (body.top_logprobs or 0) if body.logprobs else None,
      None,
      _constraint(chat_request),
      body.routing,
      service.limits.seconds,
      chat_request.stats.client,
    )
    for i, seed in enumerate(http_requests.seeds(body, body.n))
  ]


def _make_answers(chat_request: ChatRequest) -> list[AnswerStream]:
  return [
    AnswerStream(
      chat_request.service.tokenizer,
      chat_request.eos_token_ids,
      chat_request.body.stops,
    )
    for _ in range(chat_request.body.n)
  ]


def _make_readers(
  chat_request: ChatRequest,
) -> list[ContentReader | ToolCallReader]:
  count = range(chat_request.body.n)
  return [
    chat_request.plan.reader() if chat_request.plan else ContentReader()
    for _ in count
  ]


async def _whole(
  chat_request: ChatRequest, engine_requests: ClientRequests
) -> dict[str, Any]:
  answers = _make_answers(chat_request)
  merged = [AnswerDelta() for _ in answers]
  async for batch in answer_deltas(
    engine_requests, answers, chat_request.stats
  ):
    for index, delta in batch:
      merged[index] += delta
  return await asyncio.to_thread(_json, chat_request, merged)


def _json(
  chat_request: ChatRequest, merged: Sequence[AnswerDelta]
) -> dict[str, Any]:
  pairs = zip(merged, _make_readers(chat_request), strict=True)
  return chat_request.head('chat.completion') | {
    'choices': [
      {
        'index': i,
        'message': assistant_message(
          [*reader.feed(delta.text), *reader.finish()]
        ),
        'finish_reason': _reason(reader, delta),
        **_logprobs_and_routing(chat_request, delta),
      }
      for i, (delta, reader) in enumerate(pairs)
    ],
    'usage': usage(chat_request.stats),
  }


def _reason(reader: ContentReader | ToolCallReader, delta: AnswerDelta) -> str:
  finish_reason = FINISH_REASONS[delta.reason]
  return (
    'tool_calls'
    if reader.has_call and finish_reason == 'stop'
    else finish_reason
  )


def _logprobs_and_routing(
  chat_request: ChatRequest, delta: AnswerDelta
) -> dict[str, Any]:
  """A choice's log-probabilities and routing, where they were requested."""
  tokenizer, body = chat_request.service.tokenizer, chat_request.body
  fields: dict[str, Any] = {'logprobs': None}
  if body.logprobs:
    fields['logprobs'] = logprobs.chat(
      tokenizer, delta.entries, body.top_logprobs or 0
    )
  if body.routing:
    fields['routing'] = logprobs.routing(tokenizer, delta.entries)
  return fields


async def _stream(
  chat_request: ChatRequest, engine_requests: ClientRequests
) -> AsyncGenerator[dict[str, Any], None]:
  head = chat_request.head('chat.completion.chunk')
  if chat_request.body.usage:
    head['usage'] = None
  answers, readers = _make_answers(chat_request), _make_readers(chat_request)
  for i in range(chat_request.body.n):
    yield head | {
      'choices': [_stream_choice(i, {'role': 'assistant', 'content': ''})]
    }
  async for batch in answer_deltas(
    engine_requests, answers, chat_request.stats
  ):
    for index, delta in batch:
      for choice in _stream_choices(chat_request, index, delta, readers[index]):
        yield head | {'choices': [choice]}
  if chat_request.body.usage:
    yield head | {'choices': [], 'usage': usage(chat_request.stats)}


def _stream_choices(
  chat_request: ChatRequest,
  index: int,
  delta: AnswerDelta,
  reader: ContentReader | ToolCallReader,
) -> list[dict[str, Any]]:
  """The chunks of a delta: its text, tool calls and finish reason."""
  deltas = reader.feed(delta.text) if delta.text else []
  if delta.reason:
    deltas += reader.finish()
  if delta.entries and not deltas:
    # Its tokens are told even where their text is held back.
    deltas = [{'content': ''}]
  choices = [_stream_choice(index, delta_) for delta_ in deltas]
  if choices:
    choices[0] |= _logprobs_and_routing(chat_request, delta)
  if delta.reason:
    choices.append(_stream_choice(index, {}, _reason(reader, delta)))
  return choices


def _stream_choice(
  index: int, delta: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
  return {
    'index': index,
    'delta': delta,
    'logprobs': None,
    'finish_reason': reason,
  }
