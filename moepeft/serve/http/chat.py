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

from moepeft.serve import protocol
from moepeft.serve.http import asking, logprobs
from moepeft.serve.http.answer import REASONS, Answer, Delta, deltas
from moepeft.serve.http.body import read
from moepeft.serve.http.errors import wrong
from moepeft.serve.http.models import Model
from moepeft.serve.http.schemas import Chat
from moepeft.serve.http.service import Service
from moepeft.serve.http.sse import EventStream
from moepeft.serve.http.tally import Tally
from moepeft.serve.http.underway import Underway, unless_gone
from moepeft.serve.http.usage import usage


@dataclasses.dataclass(frozen=True)
class Talk:
  """One request for a turn of the assistant.

  Attributes:
    id: of the completion.
    created: Unix time.
  """

  service: Service
  asked: Chat
  model: Model
  tally: Tally
  id: str
  created: int

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
  asking.check_choices(asked.n, service.limits)
  model = service.models.find(asked.model)
  tally.model = model.name
  name = f'chatcmpl-{secrets.token_hex(12)}'
  talk = Talk(service, asked, model, tally, name, int(time.time()))
  words = service.words
  ids = await words.away(
    words.chat, asked.messages, asked.tools or (), model.voice
  )
  tally.prompt = len(ids)
  requests = await asyncio.to_thread(_requests, talk, ids)
  underway = asking.submit(service.engine, requests, 'messages')
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


def _requests(talk: Talk, ids: Sequence[int]) -> list[protocol.Request]:
  """An answer's question each."""
  service, asked = talk.service, talk.asked
  length = asking.length(
    asked.length, None, len(ids), service.engine, service.limits, 'messages'
  )
  return [
    protocol.Request(
      f'{talk.id}/{i}',
      tuple(ids),
      length,
      talk.model.adapter,
      asking.sampling(asked),
      seed,
      service.words.ends,
      (asked.top_logprobs or 0) if asked.logprobs else None,
      None,
      asking.constraint(asked.response_format, service.compiler),
      asked.routing,
      service.limits.seconds,
    )
    for i, seed in enumerate(asking.seeds(asked, asked.n))
  ]


def _answers(talk: Talk) -> list[Answer]:
  return [
    Answer(talk.service.words, talk.asked.stops) for _ in range(talk.asked.n)
  ]


async def _whole(talk: Talk, underway: Underway) -> dict[str, Any]:
  answers = _answers(talk)
  found = [Delta() for _ in answers]
  async for news in deltas(underway, answers, talk.tally):
    for index, delta in news:
      found[index] += delta
  return await asyncio.to_thread(_json, talk, found)


def _json(talk: Talk, found: Sequence[Delta]) -> dict[str, Any]:
  return talk.head('chat.completion') | {
    'choices': [
      {
        'index': i,
        'message': {
          'role': 'assistant',
          'content': delta.text,
          'refusal': None,
        },
        'finish_reason': REASONS[delta.reason],
        **_extras(talk, delta),
      }
      for i, delta in enumerate(found)
    ],
    'usage': usage(talk.tally),
  }


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
  answers = _answers(talk)
  for i in range(talk.asked.n):
    yield head | {'choices': [_part(i, {'role': 'assistant', 'content': ''})]}
  async for news in deltas(underway, answers, talk.tally):
    for index, delta in news:
      for choice in _parts(talk, index, delta):
        yield head | {'choices': [choice]}
  if talk.asked.usage:
    yield head | {'choices': [], 'usage': usage(talk.tally)}


def _parts(talk: Talk, index: int, delta: Delta) -> list[dict[str, Any]]:
  """What a stream says of news: the text, and that it is at its end."""
  found = []
  if delta.text or delta.entries:
    part = _part(index, {'content': delta.text})
    found.append(part | _extras(talk, delta))
  if delta.reason:
    found.append(_part(index, {}, REASONS[delta.reason]))
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
