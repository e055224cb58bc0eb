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
from moepeft.serve.http.completion_stream import REASONS, Answer, Delta, deltas
from moepeft.serve.http.errors import wrong
from moepeft.serve.http.event_bridge import Underway, unless_gone
from moepeft.serve.http.model_registry import Model
from moepeft.serve.http.request_stats import Tally, usage
from moepeft.serve.http.schemas import Chat
from moepeft.serve.http.service import Plan, Reader, Service
from moepeft.serve.http.sse import EventStream
from moepeft.serve.http.tool_calls import Plain, message


@dataclasses.dataclass(frozen=True)
class Talk:
  """One request for a turn of the assistant.

  Attributes:
    plan: of its tools, None where there are none.
    id: of the completion.
    created: Unix time.
    ends: ids that end an answer.
  """

  service: Service
  asked: Chat
  model: Model
  plan: Plan | None
  tally: Tally
  id: str
  created: int
  ends: tuple[int, ...]

  def head(self, kind: str) -> dict[str, Any]:
    """What the whole answer, and each part of a stream, begins with."""
    return {
      'id': self.id,
      'object': kind,
      'created': self.created,
      'model': self.model.name,
      'system_fingerprint': self.model.fingerprint,
    }


async def chat(service: Service, request: Request) -> Response:
  tally = request.scope['tally']
  asked = await read(request, Chat, service.limits.body)
  _check(asked)
  http_requests.check_choices(asked.n, service.limits)
  model = service.find(asked.model)
  tally.model = model.name
  name = f'chatcmpl-{secrets.token_hex(12)}'
  plan = await asyncio.to_thread(
    planned,
    service,
    model,
    asked.tools,
    asked.tool_choice,
    asked.parallel_tool_calls is not False,
  )
  words, now = service.words, int(time.time())
  ends = await words.away(words.ends_of, model.voice)
  talk = Talk(service, asked, model, plan, tally, name, now, ends)
  ids = await words.away(words.chat, asked.messages, model.voice, plan)
  tally.prompt = len(ids)
  requests = await asyncio.to_thread(_requests, talk, ids)
  underway = http_requests.submit(service.engine, requests, 'messages')
  if asked.stream:
    return EventStream(_stream(talk, underway), underway.close)
  try:
    whole = await unless_gone(request.receive, _whole(talk, underway))
  finally:
    underway.close()
  return JSONResponse(whole)


def _check(asked: Chat) -> None:
  if asked.top_logprobs and not asked.logprobs:
    raise wrong('top_logprobs needs logprobs=true', 'top_logprobs')
  if asked.stream_options and not asked.stream:
    raise wrong('stream_options needs stream=true', 'stream_options')


def planned(
  service: Service,
  model: Model,
  tools: list | None,
  choice: Any,
  parallel: bool,
) -> Plan | None:
  """What comes of OpenAI's tools and tool_choice; None without tools.

  Raises:
    Problem: they are wrong.
  """
  if not tools:
    if choice not in (None, 'none', 'auto'):
      raise wrong('tool_choice needs tools', 'tool_choice')
    return None
  if service.calling is None:
    raise wrong('this server does not call tools; leave them out', 'tools')
  template = service.words.template(model.voice)
  return service.calling.plan(tools, choice, parallel, template)


def _constraint(talk: Talk) -> api.Constraint | None:
  plan, wanted = talk.plan, talk.asked.response_format
  if plan is None:
    return http_requests.constraint(wanted, talk.service.compiler)
  if wanted is not None and wanted.type != 'text' and plan.free:
    raise wrong(
      'response_format and tools that need not be called cannot both be kept; '
      "leave one out, or set tool_choice to 'required'",
      'response_format',
    )
  return plan.constraint()


def _requests(talk: Talk, ids: Sequence[int]) -> list[api.Request]:
  """An answer's question each."""
  service, asked = talk.service, talk.asked
  length = http_requests.length(
    asked.length,
    None,
    len(ids),
    service.engine,
    service.limits,
    'messages',
    talk.model.before,
  )
  return [
    api.Request(
      f'{talk.id}/{i}',
      tuple(ids),
      length,
      talk.model.adapter,
      http_requests.sampling(asked),
      seed,
      talk.ends,
      (asked.top_logprobs or 0) if asked.logprobs else None,
      None,
      _constraint(talk),
      asked.routing,
      service.limits.seconds,
      talk.tally.client,
    )
    for i, seed in enumerate(http_requests.seeds(asked, asked.n))
  ]


def _answers(talk: Talk) -> list[Answer]:
  return [
    Answer(talk.service.words, talk.ends, talk.asked.stops)
    for _ in range(talk.asked.n)
  ]


def _readers(talk: Talk) -> list[Reader]:
  count = range(talk.asked.n)
  return [talk.plan.reader() if talk.plan else Plain() for _ in count]


async def _whole(talk: Talk, underway: Underway) -> dict[str, Any]:
  answers = _answers(talk)
  found = [Delta() for _ in answers]
  async for news in deltas(underway, answers, talk.tally):
    for index, delta in news:
      found[index] += delta
  return await asyncio.to_thread(_json, talk, found)


def _json(talk: Talk, found: Sequence[Delta]) -> dict[str, Any]:
  pairs = zip(found, _readers(talk), strict=True)
  return talk.head('chat.completion') | {
    'choices': [
      {
        'index': i,
        'message': message([*reader.feed(delta.text), *reader.finish()]),
        'finish_reason': _reason(reader, delta),
        **_extras(talk, delta),
      }
      for i, (delta, reader) in enumerate(pairs)
    ],
    'usage': usage(talk.tally),
  }


def _reason(reader: Reader, delta: Delta) -> str:
  found = REASONS[delta.reason]
  return 'tool_calls' if reader.called and found == 'stop' else found


def _extras(talk: Talk, delta: Delta) -> dict[str, Any]:
  """Of a choice, whole or in part: what was asked for beside its text."""
  words, asked = talk.service.words, talk.asked
  found: dict[str, Any] = {'logprobs': None}
  if asked.logprobs:
    found['logprobs'] = logprobs.chat(
      words, delta.entries, asked.top_logprobs or 0
    )
  if asked.routing:
    found['routing'] = logprobs.routing(words, delta.entries)
  return found


async def _stream(
  talk: Talk, underway: Underway
) -> AsyncGenerator[dict[str, Any], None]:
  head = talk.head('chat.completion.chunk')
  if talk.asked.usage:
    head['usage'] = None
  answers, readers = _answers(talk), _readers(talk)
  for i in range(talk.asked.n):
    yield head | {'choices': [_part(i, {'role': 'assistant', 'content': ''})]}
  async for news in deltas(underway, answers, talk.tally):
    for index, delta in news:
      for choice in _parts(talk, index, delta, readers[index]):
        yield head | {'choices': [choice]}
  if talk.asked.usage:
    yield head | {'choices': [], 'usage': usage(talk.tally)}


def _parts(
  talk: Talk, index: int, delta: Delta, reader: Reader
) -> list[dict[str, Any]]:
  """What a stream says of news: the text, and that it is at its end."""
  said = reader.feed(delta.text) if delta.text else []
  if delta.reason:
    said += reader.finish()
  if delta.entries and not said:
    # Its tokens are told even where their text is held back.
    said = [{'content': ''}]
  found = [_part(index, one) for one in said]
  if found:
    found[0] |= _extras(talk, delta)
  if delta.reason:
    found.append(_part(index, {}, _reason(reader, delta)))
  return found


def _part(
  index: int, delta: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
  return {
    'index': index,
    'delta': delta,
    'logprobs': None,
    'finish_reason': reason,
  }
