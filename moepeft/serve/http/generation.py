# SPDX-License-Identifier: Apache-2.0
"""The part of a generation request that chat and completions share."""

import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moepeft.inference import api
from moepeft.serve.embeddings.chooser import AdapterChoice
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
  """A chat or completions request.

  Attributes:
    id: the id of the completion.
    eos_token_ids: ids that end an answer.
    choice: how the model was chosen; None if the request names it.
    created: the Unix time of the request.
  """

  service: Service
  body: GenerationFields
  model: RegisteredModel
  stats: RequestStats
  id: str
  eos_token_ids: tuple[int, ...]
  choice: AdapterChoice | None
  created: int = dataclasses.field(
    default_factory=lambda: int(time.time()), kw_only=True
  )

  def common_fields(self, kind: str) -> Json:
    """The fields that a response and each chunk of a stream have."""
    return {
      'id': self.id,
      'object': kind,
      'created': self.created,
      'model': self.model.name,
      'system_fingerprint': self.model.fingerprint,
    }

  def auto_fields(self) -> Json:
    """The extension `auto` of a response, and of a stream's first chunk."""
    if self.choice is None:
      return {}
    similarity, threshold = self.choice.similarity, self.choice.threshold
    return {'auto': {'similarity': similarity, 'threshold': threshold}}

  def max_new_tokens(
    self, ids: Sequence[int], requested: int | None, default: int | None, param
  ) -> int:
    """See `requests.max_new_tokens`."""
    return http_requests.max_new_tokens(
      requested,
      default,
      len(ids),
      self.service.engine,
      self.service.limits,
      param,
      self.model.soft_prompt_length,
    )

  def engine_request(
    self,
    index: int,
    ids: Sequence[int],
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    constraint: api.Constraint | None,
    prompt_logprobs: int | None = None,
  ) -> api.Request:
    """Makes the engine request of one answer.

    Raises:
      ApiError: a token of logit_bias is not in the vocabulary.
    """
    http_requests.check_ids(
      [token for token, _ in self.body.token_bias],
      self.service.engine.vocab,
      'logit_bias',
    )
    return api.Request(
      f'{self.id}/{index}',
      tuple(ids),
      max_tokens,
      self.model.adapter,
      http_requests.make_sampling(self.body),
      seed,
      self.eos_token_ids,
      logprobs,
      prompt_logprobs,
      constraint,
      bool(self.body.routing),
      self.service.limits.seconds,
      self.stats.client,
      task=self.body.task or '',
      embedding=tuple(self.body.embedding or ()),
    )

  async def complete(
    self, engine_requests: ClientRequests, answers: Sequence[AnswerStream]
  ) -> list[AnswerDelta]:
    """Waits for all answers to finish, and returns them."""
    deltas = [AnswerDelta() for _ in answers]
    async for batch in answer_deltas(engine_requests, answers, self.stats):
      for index, delta in batch:
        deltas[index] += delta
    return deltas

  def response(self, kind: str, choices: Sequence[Json]) -> Json:
    """The body of a response without streaming."""
    fields = self.common_fields(kind) | self.auto_fields()
    return fields | {'choices': list(choices), 'usage': usage(self.stats)}

  async def chunks(
    self, kind: str, choices: AsyncGenerator[Json, None]
  ) -> AsyncGenerator[Json, None]:
    """Yields the chunks of a stream, one for each choice, then the usage."""
    common_fields = self.common_fields(kind)
    if self.body.include_usage:
      common_fields['usage'] = None
    extension = self.auto_fields()
    async for choice in choices:
      yield common_fields | {'choices': [choice]} | extension
      extension = {}
    if self.body.include_usage:
      yield common_fields | {'choices': [], 'usage': usage(self.stats)}


def make_choice(
  index: int,
  content: Json,
  reason: str | None,
  logprobs: Json | None = None,
  routing: list[Json] | None = None,
) -> Json:
  """Makes an OpenAI choice, with a whole answer or a delta.

  Args:
    content: the field 'text', 'message' or 'delta'.
    routing: the experts' weights; None leaves the field out.
  """
  choice = {'index': index, **content}
  choice |= {'logprobs': logprobs, 'finish_reason': reason}
  return choice if routing is None else choice | {'routing': routing}


async def respond(
  request: Request,
  engine_requests: ClientRequests,
  chunks: AsyncGenerator[Json, None] | None,
  complete: Callable[[], Awaitable[Json]],
  typed: bool = False,
) -> Response:
  """Makes an event stream, or a response with one JSON object.

  Args:
    chunks: the chunks of the stream; None without streaming.
    complete: computes the JSON object.
    typed: whether the chunks are named by their field `type`.
  """
  if chunks is not None:
    return EventStream(chunks, engine_requests.close, typed)
  try:
    return JSONResponse(await cancel_on_disconnect(request.receive, complete()))
  finally:
    engine_requests.close()
