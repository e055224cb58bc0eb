# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: OpenAI's legacy completions of texts or token ids."""

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
from moepeft.serve.http import auto, logprobs
from moepeft.serve.http import requests as http_requests
from moepeft.serve.http.body import read_body
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
  """Returns the prompt's text and its token entries.

  Args:
    prompt_text: the prompt in the request; None if the request has token ids.
    scored: the prompt's tokens; () without log-probabilities.
  """
  if not scored:
    return (tokenizer.decode(ids) if prompt_text is None else prompt_text), []
  detokenizer, offsets, text = Detokenizer(tokenizer.decode), [], ''
  for i in ids:
    offsets.append(len(text))
    text += detokenizer.feed([i])
  text += detokenizer.finish()
  text = text if prompt_text is None else prompt_text
  # The decoded text may be longer than the prompt in the request.
  pairs = zip(scored, offsets, strict=True)
  return text, [
    TokenEntry(scored_token, min(offset, len(text)))
    for scored_token, offset in pairs
  ]


_OBJECT = 'text_completion'
# OpenAI's default.
_DEFAULT_MAX_TOKENS = 16
# Prompt tokens that are decoded with an answer, for the spaces between them.
_PREFIX_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
  """A request for completions.

  Attributes:
    prompts: the prompts' ids; choice i continues prompt i // n.
  """

  body: Completion
  prompts: Sequence[Sequence[int]] = ()

  def prompt(self, choice: int) -> Sequence[int]:
    return self.prompts[choice // self.body.n]


async def completions(service: Service, request: Request) -> Response:
  """The continuations of texts or token ids."""
  stats = request.scope['stats']
  body = await read_body(request, Completion, service.limits.body)
  model, choice = await auto.find_model(
    service, request, body.model, lambda: _prompt_texts(body.prompts, service)
  )
  stats.model = model.name
  _check_body(body, service)
  prompts = await service.tokenizer.run_in_thread(
    _encode_prompts, body.prompts, service
  )
  stats.prompt = sum(map(len, prompts))
  name = f'cmpl-{secrets.token_hex(12)}'
  eos_token_ids = await service.tokenizer.run_in_thread(
    service.tokenizer.eos_token_ids_for, model.chat_settings
  )
  completion_request = CompletionRequest(
    service, body, model, stats, name, eos_token_ids, choice, prompts
  )
  requests = await asyncio.to_thread(_engine_requests, completion_request)
  answers = _make_answers(completion_request)
  engine_requests = http_requests.submit(service.engine, requests, 'prompt')
  choices = _stream(completion_request, engine_requests, answers)
  chunks = completion_request.chunks(_OBJECT, choices)

  async def complete():
    deltas = await completion_request.complete(engine_requests, answers)
    return await asyncio.to_thread(_response_body, completion_request, deltas)

  return await respond(
    request, engine_requests, chunks if body.stream else None, complete
  )


def _check_body(body: Completion, service: Service) -> None:
  http_requests.check_choices(body.n * len(body.prompts), service.limits)
  if body.stream_options and not body.stream:
    raise invalid_request('stream_options needs stream=true', 'stream_options')
  if body.echo and not service.tokenizer.decoder_only:
    raise invalid_request(
      'an encoder-decoder computes no log-probabilities of its prompt; leave '
      'echo out',
      'echo',
    )
  if body.max_tokens == 0 and not body.echo:
    raise invalid_request(
      'max_tokens=0 needs echo=true, to score the prompt',
      'max_tokens',
    )


def _encode_prompts(
  prompts: Sequence[str] | Sequence[list[int]], service: Service
):
  if not isinstance(prompts[0], str):
    for ids in prompts:
      http_requests.check_ids(ids, service.engine.vocab, 'prompt')
    return prompts
  return [service.tokenizer.encode_prompt(text) for text in prompts]


def _prompt_texts(
  prompts: Sequence[str] | Sequence[list[int]], service: Service
) -> Sequence[str]:
  if isinstance(prompts[0], str):
    return prompts
  return [
    service.tokenizer.decode(ids) for ids in _encode_prompts(prompts, service)
  ]


def _engine_requests(
  completion_request: CompletionRequest,
) -> list[api.Request]:
  """Makes the engine request of each choice."""
  service, body = completion_request.service, completion_request.body
  prompt_logprobs = body.logprobs if body.echo else None
  # With a seed, all prompts use the same seeds; otherwise each has its own.
  count = body.n * (len(completion_request.prompts) if body.seed is None else 1)
  seeds = http_requests.answer_seeds(body, count)
  return [
    completion_request.engine_request(
      i,
      completion_request.prompt(i),
      completion_request.max_new_tokens(
        completion_request.prompt(i),
        body.max_tokens,
        _DEFAULT_MAX_TOKENS,
        'prompt',
      ),
      seeds[i % count],
      body.logprobs,
      http_requests.make_constraint(body.response_format, service.compiler),
      prompt_logprobs,
    )
    for i in range(body.n * len(completion_request.prompts))
    # An echoed prompt without log-probabilities needs no computation.
    if body.max_tokens != 0 or body.logprobs is not None
  ]


def _make_answers(completion_request: CompletionRequest) -> list[AnswerStream]:
  tokenizer, stops = (
    completion_request.service.tokenizer,
    completion_request.body.stops,
  )
  prefix_length = _PREFIX_TOKENS if tokenizer.decoder_only else 0
  return [
    AnswerStream(
      tokenizer,
      completion_request.eos_token_ids,
      stops,
      completion_request.prompt(i)[-prefix_length:] if prefix_length else (),
    )
    for i in range(completion_request.body.n * len(completion_request.prompts))
  ]


def _response_body(
  completion_request: CompletionRequest, deltas: Sequence[AnswerDelta]
) -> dict[str, Any]:
  choices = []
  for i, delta in enumerate(deltas):
    text, entries = _echoed_prompt(completion_request, i, delta.prompt)
    answer_entries = _shift_offsets(delta.entries, len(text))
    reason = FINISH_REASONS[delta.reason or api.LENGTH]
    choices.append(
      _choice(
        completion_request,
        i,
        text + delta.text,
        [*entries, *answer_entries],
        reason,
      )
    )
  return completion_request.response(_OBJECT, choices)


def _echoed_prompt(
  completion_request: CompletionRequest,
  choice: int,
  scored: Sequence[api.TokenLogprob],
) -> tuple[str, list[TokenEntry]]:
  """Returns an echoed prompt and its token entries; ('', []) without echo."""
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


def _shift_offsets(
  entries: Sequence[TokenEntry], shift: int
) -> list[TokenEntry]:
  """Shifts the text offsets of entries."""
  return [
    dataclasses.replace(entry, offset=entry.offset + shift) for entry in entries
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
    scores['logprobs'] = logprobs.completion_logprobs(
      tokenizer, entries, body.logprobs
    )
  if body.routing:
    scores['routing'] = logprobs.token_routing(
      tokenizer, entries, body.routing == 'layers'
    )
  return make_choice(index, {'text': text}, reason, **scores)


async def _stream(
  completion_request: CompletionRequest,
  engine_requests: ClientRequests,
  answers: Sequence[AnswerStream],
) -> AsyncGenerator[dict[str, Any], None]:
  """Yields the choices of the stream's chunks."""
  # {choice: the number of characters of its echoed prompt}.
  prompt_chars: dict[int, int] = {}
  body = completion_request.body
  scored = body.echo and body.logprobs is not None
  if body.echo and not scored:
    for i in range(len(answers)):
      text, _ = _echoed_prompt(completion_request, i, ())
      prompt_chars[i] = len(text)
      yield _choice(completion_request, i, text, [], None)
  async for batch in answer_deltas(
    engine_requests, answers, completion_request.stats
  ):
    for index, delta in batch:
      text, entries = '', []
      if scored and delta.prompt:
        text, entries = _echoed_prompt(completion_request, index, delta.prompt)
        prompt_chars[index] = len(text)
      entries += _shift_offsets(delta.entries, prompt_chars.get(index, 0))
      reason = FINISH_REASONS[delta.reason] if delta.reason else None
      text += delta.text
      if text or entries or reason:
        yield _choice(completion_request, index, text, entries, reason)
