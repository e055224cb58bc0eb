# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moepeft.inference import api
from moepeft.serve.http import auto, logprobs
from moepeft.serve.http import requests as http_requests
from moepeft.serve.http.body import read_body
from moepeft.serve.http.completion_stream import (
  FINISH_REASONS,
  AnswerDelta,
  AnswerStream,
  answer_deltas,
)
from moepeft.serve.http.errors import invalid_request
from moepeft.serve.http.event_bridge import ClientRequests
from moepeft.serve.http.generation import (
  GenerationRequest,
  make_choice,
  respond,
)
from moepeft.serve.http.model_registry import RegisteredModel
from moepeft.serve.http.schemas import Chat
from moepeft.serve.http.service import Service
from moepeft.serve.http.tool_calls import (
  ContentReader,
  ToolCallReader,
  ToolPlan,
  assistant_message,
)


@dataclasses.dataclass(frozen=True)
class ChatRequest(GenerationRequest):
  """A request for the assistant's next turn.

  Attributes:
    plan: the tool plan; None without tools.
  """

  body: Chat
  plan: ToolPlan | None = None

  def make_readers(self) -> list[ContentReader | ToolCallReader]:
    return [
      self.plan.reader() if self.plan else ContentReader()
      for _ in range(self.body.n)
    ]


@dataclasses.dataclass(frozen=True)
class StartedChat:
  """A chat request whose answers the engine computes."""

  request: ChatRequest
  engine_requests: ClientRequests
  answers: Sequence[AnswerStream]


async def chat(service: Service, request: Request) -> Response:
  """The next turn of a conversation, as in OpenAI's chat completions."""
  body = await read_body(request, Chat, service.limits.body)
  _check_body(body)
  name = f'chatcmpl-{secrets.token_hex(12)}'
  started = await start(service, request, body, name)
  chat_request, engine_requests = started.request, started.engine_requests
  choices = _stream(chat_request, engine_requests, started.answers)
  chunks = chat_request.chunks('chat.completion.chunk', choices)

  async def complete():
    deltas = await chat_request.complete(engine_requests, started.answers)
    return await asyncio.to_thread(_response_body, chat_request, deltas)

  return await respond(
    request, engine_requests, chunks if body.stream else None, complete
  )


async def start(
  service: Service, request: Request, body: Chat, name: str
) -> StartedChat:
  """Submits a chat to the engine.

  Args:
    name: the id of the completion.

  Raises:
    ApiError: a field is invalid, or the engine does not accept the chat.
  """
  stats = request.scope['stats']
  http_requests.check_choices(body.n, service.limits)
  model, choice = await auto.find_model(
    service, request, body.model, lambda: [auto.user_text(body.messages)]
  )
  stats.model = model.name
  plan = await asyncio.to_thread(
    make_tool_plan,
    service,
    model,
    body.tools,
    body.tool_choice,
    body.parallel_tool_calls is not False,
  )
  tokenizer = service.tokenizer
  eos_token_ids = await tokenizer.run_in_thread(
    tokenizer.eos_token_ids_for, model.chat_settings
  )
  chat_request = ChatRequest(
    service, body, model, stats, name, eos_token_ids, choice, plan
  )
  ids = await tokenizer.run_in_thread(
    tokenizer.encode_chat, body.messages, model.chat_settings, plan
  )
  stats.prompt = len(ids)
  requests = await asyncio.to_thread(_engine_requests, chat_request, ids)
  answers = _make_answers(chat_request)
  engine_requests = http_requests.submit(service.engine, requests, 'messages')
  return StartedChat(chat_request, engine_requests, answers)


def _check_body(body: Chat) -> None:
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
  """Makes the plan of OpenAI's tools and tool_choice; None without tools.

  Raises:
    ApiError: a tool or the choice is invalid.
  """
  if not tools:
    if choice not in (None, 'none', 'auto'):
      raise invalid_request('tool_choice needs tools', 'tool_choice')
    return None
  if service.tool_planner is None:
    raise invalid_request(
      'this server does not support tools; leave them out', 'tools'
    )
  template = service.tokenizer.chat_template(model.chat_settings)
  return service.tool_planner.plan(tools, choice, parallel, template)


def _constraint(chat_request: ChatRequest) -> api.Constraint | None:
  plan, response_format = chat_request.plan, chat_request.body.response_format
  if plan is None:
    return http_requests.make_constraint(
      response_format, chat_request.service.compiler
    )
  if (
    response_format is not None
    and response_format.is_constraint
    and plan.may_be_text
  ):
    raise invalid_request(
      'response_format cannot be combined with optional tools; leave one out, '
      "or set tool_choice to 'required'",
      'response_format',
    )
  return plan.constraint()


def _engine_requests(
  chat_request: ChatRequest, ids: Sequence[int]
) -> list[api.Request]:
  """Makes the engine request of each answer."""
  body = chat_request.body
  max_tokens = chat_request.max_new_tokens(
    ids, body.max_answer_tokens, None, 'messages'
  )
  top = (body.top_logprobs or 0) if body.logprobs else None
  return [
    chat_request.engine_request(
      i, ids, max_tokens, seed, top, _constraint(chat_request)
    )
    for i, seed in enumerate(http_requests.answer_seeds(body, body.n))
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


def _response_body(
  chat_request: ChatRequest, deltas: Sequence[AnswerDelta]
) -> dict[str, Any]:
  choices = []
  pairs = zip(deltas, chat_request.make_readers(), strict=True)
  for i, (delta, reader) in enumerate(pairs):
    parts = [*reader.feed(delta.text), *reader.finish()]
    content = {'message': assistant_message(parts)}
    reason = _finish_reason(reader, delta)
    choices.append(
      make_choice(i, content, reason, **_scores(chat_request, delta))
    )
  return chat_request.response('chat.completion', choices)


def _finish_reason(
  reader: ContentReader | ToolCallReader, delta: AnswerDelta
) -> str:
  reason = FINISH_REASONS[delta.reason]
  return 'tool_calls' if reader.has_call and reason == 'stop' else reason


def _scores(chat_request: ChatRequest, delta: AnswerDelta) -> dict[str, Any]:
  """The log-probabilities and routing of a choice, if requested."""
  tokenizer, body = chat_request.service.tokenizer, chat_request.body
  scores: dict[str, Any] = {}
  if body.logprobs:
    top = body.top_logprobs or 0
    scores['logprobs'] = logprobs.chat_logprobs(tokenizer, delta.entries, top)
  if body.routing:
    scores['routing'] = logprobs.token_routing(
      tokenizer, delta.entries, body.routing == 'layers'
    )
  return scores


async def _stream(
  chat_request: ChatRequest,
  engine_requests: ClientRequests,
  answers: Sequence[AnswerStream],
) -> AsyncGenerator[dict[str, Any], None]:
  """Yields the choices of the stream's chunks."""
  readers = chat_request.make_readers()
  for i in range(len(answers)):
    yield make_choice(i, {'delta': {'role': 'assistant', 'content': ''}}, None)
  async for batch in answer_deltas(
    engine_requests, answers, chat_request.stats
  ):
    for index, delta in batch:
      for choice in _stream_choices(chat_request, index, delta, readers[index]):
        yield choice


def _stream_choices(
  chat_request: ChatRequest,
  index: int,
  delta: AnswerDelta,
  reader: ContentReader | ToolCallReader,
) -> list[dict[str, Any]]:
  """The choices of a delta: its text, tool calls and finish reason."""
  deltas = reader.feed(delta.text) if delta.text else []
  if delta.reason:
    deltas += reader.finish()
  if delta.entries and not deltas:
    # Tokens are reported although their text is withheld.
    deltas = [{'content': ''}]
  scores = _scores(chat_request, delta)
  choices = [
    make_choice(index, {'delta': part}, None, **({} if i else scores))
    for i, part in enumerate(deltas)
  ]
  if delta.reason:
    choices.append(
      make_choice(index, {'delta': {}}, _finish_reason(reader, delta))
    )
  return choices
