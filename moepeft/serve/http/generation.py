# SPDX-License-Identifier: Apache-2.0
"""A request for text, as chat and completions share it: from its fields to the
engine's requests, and from their events to a response."""

import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.inference import api
from moepeft.serve.http import requests as http_requests
from moepeft.serve.http.completion_stream import (
  AnswerDelta,
  AnswerStream,
  answer_deltas,
)
from moepeft.serve.http.event_bridge import ClientRequests, cancel_on_disconnect
from moepeft.serve.http.model_registry import RegisteredModel
from moepeft.serve.http.request_stats import RequestStats, usage
from moepeft.serve.http.schemas import GenerationFields
from moepeft.serve.http.service import Service
from moepeft.serve.http.sse import EventStream

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
  """One request for answers.

  Attributes:
    id: of the completion.
    eos_token_ids: ids that end an answer.
    created: Unix time.
  """

  service: Service
  body: GenerationFields
  model: RegisteredModel
  stats: RequestStats
  id: str
  eos_token_ids: tuple[int, ...]
  created: int = dataclasses.field(
    default_factory=lambda: int(time.time()), kw_only=True
  )

  def head(self, kind: str) -> Json:
    """The fields that a response and each chunk of a stream begin with."""
    return {
      'id': self.id,
      'object': kind,
      'created': self.created,
      'model': self.model.name,
      'system_fingerprint': self.model.fingerprint,
    }

  def answer_length(
    self, ids: Sequence[int], requested: int | None, default: int | None, param
  ) -> int:
    """See `requests.answer_length`."""
    return http_requests.answer_length(
      requested,
      default,
      len(ids),
      self.service.engine,
      self.service.limits,
      param,
      self.model.before,
    )

  def engine_request(
    self,
    index: int,
    ids: Sequence[int],
    length: int,
    seed: int,
    logprobs: int | None,
    constraint: api.Constraint | None,
    prompt_logprobs: int | None = None,
  ) -> api.Request:
    """The engine's request for one answer."""
    return api.Request(
      f'{self.id}/{index}',
      tuple(ids),
      length,
      self.model.adapter,
      http_requests.sampling(self.body),
      seed,
      self.eos_token_ids,
      logprobs,
      prompt_logprobs,
      constraint,
      self.body.routing,
      self.service.limits.seconds,
      self.stats.client,
    )

  async def whole(
    self, engine_requests: ClientRequests, answers: Sequence[AnswerStream]
  ) -> list[AnswerDelta]:
    """The answers, once all have finished."""
    merged = [AnswerDelta() for _ in answers]
    async for batch in answer_deltas(engine_requests, answers, self.stats):
      for index, delta in batch:
        merged[index] += delta
    return merged

  def response(self, kind: str, choices: Sequence[Json]) -> Json:
    """The body of a response that is no stream."""
    return self.head(kind) | {
      'choices': list(choices),
      'usage': usage(self.stats),
    }

  async def chunks(
    self, kind: str, choices: AsyncGenerator[Json, None]
  ) -> AsyncGenerator[Json, None]:
    """The chunks of a stream, a choice each, and its usage at the end."""
    head = self.head(kind)
    if self.body.usage:
      head['usage'] = None
    async for choice in choices:
      yield head | {'choices': [choice]}
    if self.body.usage:
      yield head | {'choices': [], 'usage': usage(self.stats)}


def make_choice(
  index: int,
  content: Json,
  reason: str | None,
  logprobs: Json | None = None,
  routing: list[Json] | None = None,
) -> Json:
  """An answer, or a part of it.

  Args:
    content: its text or message.
    routing: None where it was not requested.
  """
  choice = {'index': index, **content}
  choice |= {'logprobs': logprobs, 'finish_reason': reason}
  return choice if routing is None else choice | {'routing': routing}


async def respond(
  request: Request,
  engine_requests: ClientRequests,
  chunks: AsyncGenerator[Json, None] | None,
  whole: Callable[[], Awaitable[Json]],
) -> Response:
  """A stream of events, or one JSON object.

  Args:
    chunks: of the stream; None where none was requested.
    whole: computes the object.
  """
  if chunks is not None:
    return EventStream(chunks, engine_requests.close)
  try:
    return JSONResponse(await cancel_on_disconnect(request.receive, whole()))
  finally:
    engine_requests.close()
