# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: texts or ids gone on from, in OpenAI's legacy form."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moepeft.inference import api
from moepeft.inference.api import TokenLogprob
from moepeft.inference.detokenizer import Detokenizer
from moepeft.serve.http import logprobs
from moepeft.serve.http import requests as http_requests
from moepeft.serve.http.body import read
from moepeft.serve.http.completion_stream import (
  FINISH_REASONS,
  AnswerDelta,
  AnswerStream,
  TokenEntry,
  answer_deltas,
)
from moepeft.serve.http.errors import invalid_request
from moepeft.serve.http.event_bridge import ClientRequests
from moepeft.serve.http.generation import (
  GenerationRequest,
  make_choice,
  respond,
)
from moepeft.serve.http.schemas import Completion
from moepeft.serve.http.service import Service
from moepeft.serve.http.text import ServedTokenizer


def echo_text(
  tokenizer: ServedTokenizer,
  ids: Sequence[int],
  prompt_text: str | None,
  scored: Sequence[TokenLogprob],
) -> tuple[str, list[TokenEntry]]:
  """(the prompt's text, its tokens).

  Args:
    prompt_text: the prompt where it was text, which is returned as it was.
    scored: its tokens; () where they were not requested.
  """
  if not scored:
    return (tokenizer.decode(ids) if prompt_text is None else prompt_text), []
  detokenizer, offsets, text = Detokenizer(tokenizer.decode), [], ''
  for i in ids:
    offsets.append(len(text))
    text += detokenizer.feed([i])
  text += detokenizer.finish()
  text = text if prompt_text is None else prompt_text
  # A tokenizer may write a text a little otherwise than it was.
  pairs = zip(scored, offsets, strict=True)
  return text, [
    TokenEntry(scored_token, min(at, len(text))) for scored_token, at in pairs
  ]


_KIND = 'text_completion'
# OpenAI's, where a request names none.
_LENGTH = 16
# Ids before an answer that its text is joined to.
_JOINT = 8


@dataclasses.dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
  """One request for completions.

  Attributes:
    prompts: as ids; choice i goes on from prompt i // n.
  """

  body: Completion
  prompts: Sequence[Sequence[int]] = ()

  def prompt(self, choice: int) -> Sequence[int]:
    return self.prompts[choice // self.body.n]


async def completions(service: Service, request: Request) -> Response:
  stats = request.scope['stats']
  body = await read(request, Completion, service.limits.body)
  model = service.find(body.model)
  stats.model = model.name
  _check(body, service)
  prompts = await service.tokenizer.run_in_thread(_ids, body.prompts, service)
  stats.prompt = sum(map(len, prompts))
  name = f'cmpl-{secrets.token_hex(12)}'
  eos_token_ids = await service.tokenizer.run_in_thread(
    service.tokenizer.eos_token_ids_for, model.chat_settings
  )
  completion_request = CompletionRequest(
    service, body, model, stats, name, eos_token_ids, prompts
  )
  requests = await asyncio.to_thread(_engine_requests, completion_request)
  answers = _make_answers(completion_request)
  engine_requests = http_requests.submit(service.engine, requests, 'prompt')
  choices = _stream(completion_request, engine_requests, answers)
  chunks = completion_request.chunks(_KIND, choices)

  async def whole():
    deltas = await completion_request.whole(engine_requests, answers)
    return await asyncio.to_thread(_json, completion_request, deltas)

  return await respond(
    request, engine_requests, chunks if body.stream else None, whole
  )


def _check(body: Completion, service: Service) -> None:
  http_requests.check_choices(body.n * len(body.prompts), service.limits)
  if body.stream_options and not body.stream:
    raise invalid_request('stream_options needs stream=true', 'stream_options')
  if body.echo and not service.tokenizer.decoder_only:
    raise invalid_request(
      "echo is not of this model: an encoder-decoder's prompt is not part of "
      'the text that it scores',
      'echo',
    )
  if body.max_tokens == 0 and not body.echo:
    raise invalid_request(
      'max_tokens=0 asks for nothing; add echo=true to have the prompt scored',
      'max_tokens',
    )


def _ids(prompts: Sequence[str] | Sequence[list[int]], service: Service):
  if not isinstance(prompts[0], str):
    for ids in prompts:
      http_requests.check_ids(ids, service.engine.vocab, 'prompt')
    return prompts
  return [service.tokenizer.encode_prompt(text) for text in prompts]


def _engine_requests(
  completion_request: CompletionRequest,
) -> list[api.Request]:
  """A choice's question each."""
  service, body = completion_request.service, completion_request.body
  of_prompt = body.logprobs if body.echo else None
  # Prompts share what a request names; else one asked twice is drawn twice.
  count = body.n * (len(completion_request.prompts) if body.seed is None else 1)
  seeds = http_requests.seeds(body, count)
  return [
    completion_request.engine_request(
      i,
      completion_request.prompt(i),
      completion_request.answer_length(
        completion_request.prompt(i), body.max_tokens, _LENGTH, 'prompt'
      ),
      seeds[i % count],
      body.logprobs,
      http_requests.constraint(body.response_format, service.compiler),
      of_prompt,
    )
    for i in range(body.n * len(completion_request.prompts))
    # Of a prompt alone that is not scored, there is nothing to compute.
    if body.max_tokens != 0 or body.logprobs is not None
  ]


def _make_answers(completion_request: CompletionRequest) -> list[AnswerStream]:
  tokenizer, stops = (
    completion_request.service.tokenizer,
    completion_request.body.stops,
  )
  joint = _JOINT if tokenizer.decoder_only else 0
  return [
    AnswerStream(
      tokenizer,
      completion_request.eos_token_ids,
      stops,
      completion_request.prompt(i)[-joint:] if joint else (),
    )
    for i in range(completion_request.body.n * len(completion_request.prompts))
  ]


def _json(
  completion_request: CompletionRequest, merged: Sequence[AnswerDelta]
) -> dict[str, Any]:
  choices = []
  for i, delta in enumerate(merged):
    text, entries = _echoed_prompt(completion_request, i, delta.prompt)
    moved = _shift_offsets(delta.entries, len(text))
    reason = FINISH_REASONS[delta.reason or api.LENGTH]
    choices.append(
      _choice(
        completion_request, i, text + delta.text, [*entries, *moved], reason
      )
    )
  return completion_request.response(_KIND, choices)


def _echoed_prompt(
  completion_request: CompletionRequest,
  choice: int,
  scored: Sequence[api.TokenLogprob],
) -> tuple[str, list[TokenEntry]]:
  """The prompt as the text begins with it, and its tokens; echo's alone."""
  if not completion_request.body.echo:
    return '', []
  prompt = completion_request.body.prompts[choice // completion_request.body.n]
  prompt_text = prompt if isinstance(prompt, str) else None
  return echo_text(
    completion_request.service.tokenizer,
    completion_request.prompt(choice),
    prompt_text,
    scored,
  )


def _shift_offsets(entries: Sequence[TokenEntry], by: int) -> list[TokenEntry]:
  """With text before them."""
  return [
    dataclasses.replace(entry, offset=entry.offset + by) for entry in entries
  ]


def _choice(
  completion_request: CompletionRequest,
  index: int,
  text: str,
  entries: Sequence[TokenEntry],
  reason: str | None,
) -> dict[str, Any]:
  tokenizer = completion_request.service.tokenizer
  body, scores = completion_request.body, {}
  if body.logprobs is not None:
    scores['logprobs'] = logprobs.legacy(tokenizer, entries, body.logprobs)
  if body.routing:
    scores['routing'] = logprobs.routing(tokenizer, entries)
  return make_choice(index, {'text': text}, reason, **scores)


async def _stream(
  completion_request: CompletionRequest,
  engine_requests: ClientRequests,
  answers: Sequence[AnswerStream],
) -> AsyncGenerator[dict[str, Any], None]:
  """The choices of the chunks."""
  # Characters of the prompt that stand before each answer, once it is out.
  before: dict[int, int] = {}
  body = completion_request.body
  scored = body.echo and body.logprobs is not None
  if body.echo and not scored:
    for i in range(len(answers)):
      text, _ = _echoed_prompt(completion_request, i, ())
      before[i] = len(text)
      yield _choice(completion_request, i, text, [], None)
  async for batch in answer_deltas(
    engine_requests, answers, completion_request.stats
  ):
    for index, delta in batch:
      text, entries = '', []
      if scored and delta.prompt:
        text, entries = _echoed_prompt(completion_request, index, delta.prompt)
        before[index] = len(text)
      entries += _shift_offsets(delta.entries, before.get(index, 0))
      reason = FINISH_REASONS[delta.reason] if delta.reason else None
      text += delta.text
      if text or entries or reason:
        yield _choice(completion_request, index, text, entries, reason)
