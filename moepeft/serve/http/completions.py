# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: texts or ids gone on from, in OpenAI's legacy form."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.inference import api
from moepeft.inference.api import TokenLogprob
from moepeft.inference.detokenizer import Detokenizer
from moepeft.serve.http import logprobs
from moepeft.serve.http import requests as http_requests
from moepeft.serve.http.body import read
from moepeft.serve.http.completion_stream import (
  REASONS,
  Answer,
  Delta,
  Entry,
  deltas,
)
from moepeft.serve.http.errors import wrong
from moepeft.serve.http.event_bridge import Underway, unless_gone
from moepeft.serve.http.model_registry import Model
from moepeft.serve.http.request_stats import Tally, usage
from moepeft.serve.http.schemas import Completion
from moepeft.serve.http.service import Service
from moepeft.serve.http.sse import EventStream
from moepeft.serve.http.text import Words


def echoed(
  words: Words,
  ids: Sequence[int],
  given: str | None,
  scored: Sequence[TokenLogprob],
) -> tuple[str, list[Entry]]:
  """(the prompt's text, its tokens).

  Args:
    given: the prompt where it was text, which is given back as it was.
    scored: its tokens; () where they were not asked for.
  """
  if not scored:
    return (words.decode(ids) if given is None else given), []
  detokenizer, offsets, text = Detokenizer(words.decode), [], ''
  for i in ids:
    offsets.append(len(text))
    text += detokenizer.feed([i])
  text += detokenizer.finish()
  text = text if given is None else given
  # A tokenizer may write a text a little otherwise than it was.
  pairs = zip(scored, offsets, strict=True)
  return text, [Entry(one, min(at, len(text))) for one, at in pairs]


# OpenAI's, where a request names none.
_LENGTH = 16
# Ids before an answer that its text is joined to.
_JOINT = 8


@dataclasses.dataclass(frozen=True)
class Task:
  """One request for completions.

  Attributes:
    prompts: as ids; choice i goes on from prompt i // n.
    id: of the completion.
    created: Unix time.
    ends: ids that end an answer.
  """

  service: Service
  asked: Completion
  model: Model
  tally: Tally
  prompts: Sequence[Sequence[int]]
  id: str
  created: int
  ends: tuple[int, ...]

  def head(self) -> dict[str, Any]:
    return {
      'id': self.id,
      'object': 'text_completion',
      'created': self.created,
      'model': self.model.name,
      'system_fingerprint': self.model.fingerprint,
    }

  def prompt(self, choice: int) -> Sequence[int]:
    return self.prompts[choice // self.asked.n]


async def completions(service: Service, request: Request) -> Response:
  tally = request.scope['tally']
  asked = await read(request, Completion, service.limits.body)
  model = service.find(asked.model)
  tally.model = model.name
  _check(asked, service)
  prompts = await service.words.away(_ids, asked.prompts, service)
  tally.prompt = sum(map(len, prompts))
  name = f'cmpl-{secrets.token_hex(12)}'
  ends = await service.words.away(service.words.ends_of, model.voice)
  now = int(time.time())
  task = Task(service, asked, model, tally, prompts, name, now, ends)
  requests = await asyncio.to_thread(_requests, task)
  underway = http_requests.submit(service.engine, requests, 'prompt')
  if asked.stream:
    return EventStream(_stream(task, underway), underway.close)
  try:
    whole = await unless_gone(request.receive, _whole(task, underway))
  finally:
    underway.close()
  return JSONResponse(whole)


def _check(asked: Completion, service: Service) -> None:
  http_requests.check_choices(asked.n * len(asked.prompts), service.limits)
  if asked.stream_options and not asked.stream:
    raise wrong('stream_options needs stream=true', 'stream_options')
  if asked.echo and not service.words.decoder_only:
    raise wrong(
      "echo is not of this model: an encoder-decoder's prompt is not part of "
      'the text that it scores',
      'echo',
    )
  if asked.max_tokens == 0 and not asked.echo:
    raise wrong(
      'max_tokens=0 asks for nothing; add echo=true to have the prompt scored',
      'max_tokens',
    )


def _ids(prompts: Sequence[str] | Sequence[list[int]], service: Service):
  if not isinstance(prompts[0], str):
    for ids in prompts:
      http_requests.check_ids(ids, service.engine.vocab, 'prompt')
    return prompts
  return [service.words.plain(text) for text in prompts]


def _requests(task: Task) -> list[api.Request]:
  """A choice's question each."""
  service, asked = task.service, task.asked
  of_prompt = asked.logprobs if asked.echo else None
  # Prompts share what a request names; else one asked twice is drawn twice.
  count = asked.n * (len(task.prompts) if asked.seed is None else 1)
  seeds = http_requests.seeds(asked, count)
  return [
    api.Request(
      f'{task.id}/{i}',
      tuple(task.prompt(i)),
      http_requests.length(
        asked.max_tokens,
        _LENGTH,
        len(task.prompt(i)),
        service.engine,
        service.limits,
        'prompt',
        task.model.before,
      ),
      task.model.adapter,
      http_requests.sampling(asked),
      seeds[i % count],
      task.ends,
      asked.logprobs,
      of_prompt,
      http_requests.constraint(asked.response_format, service.compiler),
      asked.routing,
      service.limits.seconds,
      task.tally.client,
    )
    for i in range(asked.n * len(task.prompts))
    # Of a prompt alone that is not scored, there is nothing to compute.
    if asked.max_tokens != 0 or asked.logprobs is not None
  ]


def _answers(task: Task) -> list[Answer]:
  words, stops = task.service.words, task.asked.stops
  joint = _JOINT if words.decoder_only else 0
  return [
    Answer(words, task.ends, stops, task.prompt(i)[-joint:] if joint else ())
    for i in range(task.asked.n * len(task.prompts))
  ]


async def _whole(task: Task, underway: Underway) -> dict[str, Any]:
  answers = _answers(task)
  found = [Delta() for _ in answers]
  async for news in deltas(underway, answers, task.tally):
    for index, delta in news:
      found[index] += delta
  return await asyncio.to_thread(_json, task, found)


def _json(task: Task, found: Sequence[Delta]) -> dict[str, Any]:
  choices = []
  for i, delta in enumerate(found):
    text, entries = _before(task, i, delta.prompt)
    moved = _moved(delta.entries, len(text))
    reason = REASONS[delta.reason or api.LENGTH]
    choices.append(
      _choice(task, i, text + delta.text, [*entries, *moved], reason)
    )
  return task.head() | {'choices': choices, 'usage': usage(task.tally)}


def _before(
  task: Task, choice: int, scored: Sequence[api.TokenLogprob]
) -> tuple[str, list[Entry]]:
  """The prompt as the text begins with it, and its tokens; echo's alone."""
  if not task.asked.echo:
    return '', []
  given = task.asked.prompts[choice // task.asked.n]
  own = given if isinstance(given, str) else None
  return echoed(task.service.words, task.prompt(choice), own, scored)


def _moved(entries: Sequence[Entry], by: int) -> list[Entry]:
  """With text before them."""
  return [dataclasses.replace(one, offset=one.offset + by) for one in entries]


def _choice(
  task: Task,
  index: int,
  text: str,
  entries: Sequence[Entry],
  reason: str | None,
) -> dict[str, Any]:
  words, asked = task.service.words, task.asked
  found = {
    'index': index,
    'text': text,
    'logprobs': None,
    'finish_reason': reason,
  }
  if asked.logprobs is not None:
    found['logprobs'] = logprobs.legacy(words, entries, asked.logprobs)
  if asked.routing:
    found['routing'] = logprobs.routing(words, entries)
  return found


async def _stream(
  task: Task, underway: Underway
) -> AsyncGenerator[dict[str, Any], None]:
  head = task.head()
  if task.asked.usage:
    head['usage'] = None
  answers = _answers(task)
  # Characters of the prompt that stand before each answer, once it is out.
  before: dict[int, int] = {}
  scored = task.asked.echo and task.asked.logprobs is not None
  if task.asked.echo and not scored:
    for i in range(len(answers)):
      text, _ = _before(task, i, ())
      before[i] = len(text)
      yield head | {'choices': [_choice(task, i, text, [], None)]}
  async for news in deltas(underway, answers, task.tally):
    for index, delta in news:
      text, entries = '', []
      if scored and delta.prompt:
        text, entries = _before(task, index, delta.prompt)
        before[index] = len(text)
      entries += _moved(delta.entries, before.get(index, 0))
      reason = REASONS[delta.reason] if delta.reason else None
      text += delta.text
      if text or entries or reason:
        yield head | {'choices': [_choice(task, index, text, entries, reason)]}
  if task.asked.usage:
    yield head | {'choices': [], 'usage': usage(task.tally)}
