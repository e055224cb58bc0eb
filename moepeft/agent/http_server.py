# SPDX-License-Identifier: Apache-2.0
"""An agent over HTTP: questions in, server-sent events out.

  POST /ask              {"question": text, "session": id or null} -> events
  DELETE /sessions/ID    forgets a conversation
  GET /health            whether the process is alive

The events of a question, each with JSON data:

  session      id, for the next question of the conversation
  step         number, seconds: a request to the model begins
  text_delta   text: a piece of the model's text
  tool_call    id, name, arguments
  tool_result  id, name, text, failed
  answer       text, state ('answered', 'unsure' or 'cut'), why, and the budget
               used: steps, calls, tokens, seconds
  error        message, state
  done         the last event
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pydantic
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moepeft.agent.agent import Agent
from moepeft.agent.loop import Event
from moepeft.agent.memory import Memory
from moepeft.agent.tools import validation_message
from moepeft.core import http_access
from moepeft.core.http_access import ApiKeys
from moepeft.core.untrusted import Malformed, parse_json

_MAX_BODY, _MAX_QUESTION = 1 << 20, 100_000
# Conversations in memory; the one that was used longest ago is forgotten.
_MAX_SESSIONS = 64
# Questions that are answered at once.
_MAX_QUESTIONS = 4
_MAX_CONNECTIONS, _MAX_HEAD = 64, 1 << 15
# States of an outcome that has an answer; see `loop.Outcome`.
_ANSWERED = ('answered', 'unsure', 'cut')


class Question(pydantic.BaseModel):
  """The body of POST /ask."""

  model_config = pydantic.ConfigDict(strict=True, extra='forbid')
  question: str = pydantic.Field(min_length=1, max_length=_MAX_QUESTION)
  session: str | None = pydantic.Field(None, max_length=64)


class RequestError(Exception):
  """An error response, in the form of the OpenAI API."""

  def __init__(self, status: int, message: str, code: str):
    super().__init__(message)
    self.status, self.message, self.code = status, message, code

  def response(self) -> JSONResponse:
    error = {
      'message': self.message,
      'type': 'invalid_request_error',
      'param': None,
      'code': self.code,
    }
    return JSONResponse({'error': error}, self.status)


class ClientLeft(BaseException):
  """Ends a question whose client has disconnected.

  Not an Exception, as errors of a tool or the model do not end a question.
  """


@dataclasses.dataclass(eq=False)
class Session:
  """A conversation.

  Attributes:
    busy: whether a question is being answered.
  """

  id: str
  agent: Agent
  busy: bool = False


class AgentServer:
  """Answers questions with copies of an agent, one for each conversation."""

  def __init__(self, agent: Agent):
    self._agent = agent
    self._sessions: collections.OrderedDict[str, Session] = (
      collections.OrderedDict()
    )

  def app(self, keys: ApiKeys, hosts: tuple[str, ...]) -> ASGIApp:
    """The ASGI application.

    Args:
      keys: those of clients.
      hosts: accepted values of the header Host; () for any.
    """
    routes = [
      Route('/ask', self._ask, methods=['POST']),
      Route('/sessions/{id}', self._delete, methods=['DELETE']),
      Route('/health', _health, methods=['GET']),
    ]
    handlers = {RequestError: _error_response}
    starlette = Starlette(routes=routes, exception_handlers=handlers)
    return _AccessCheck(starlette, keys, hosts)

  async def _ask(self, request: Request) -> Response:
    body = await _read_question(request)
    session = self._open(body.session)
    events = _start(session, body.question)
    headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
    return StreamingResponse(
      events, media_type='text/event-stream', headers=headers
    )

  async def _delete(self, request: Request) -> Response:
    session = self._find(request.path_params['id'])
    if session.busy:
      raise RequestError(409, 'the session answers a question', 'busy')
    del self._sessions[session.id]
    return JSONResponse({'id': session.id, 'deleted': True})

  def _open(self, name: str | None) -> Session:
    """The session of a question, marked as busy; a new one without a name."""
    if sum(s.busy for s in self._sessions.values()) >= _MAX_QUESTIONS:
      message = f'{_MAX_QUESTIONS} questions are being answered; try later'
      raise RequestError(429, message, 'too_many_questions')
    if name is not None:
      session = self._find(name)
      if session.busy:
        raise RequestError(
          409, 'the session answers a question; wait for it', 'busy'
        )
    else:
      if len(self._sessions) >= _MAX_SESSIONS:
        idle = next(s for s in self._sessions.values() if not s.busy)
        del self._sessions[idle.id]
      memory = Memory(self._agent.memory.limit, self._agent.memory.count)
      agent = dataclasses.replace(self._agent, memory=memory)
      session = Session(secrets.token_urlsafe(24), agent)
      self._sessions[session.id] = session
    self._sessions.move_to_end(session.id)
    session.busy = True
    return session

  def _find(self, name: str) -> Session:
    if name not in self._sessions:
      raise RequestError(
        404,
        'there is no such session; ask without one for a new conversation',
        'session_not_found',
      )
    return self._sessions[name]


def _start(session: Session, question: str) -> AsyncIterator[bytes]:
  """Starts to answer a question on a thread, and returns its events as bytes.

  When the client leaves, the question ends at its next event, and the
  conversation is as it was before.
  """
  loop = asyncio.get_running_loop()
  queue: asyncio.Queue[tuple[str, dict] | None] = asyncio.Queue()
  left = threading.Event()
  steps = 0

  def put(item: tuple[str, dict] | None) -> None:
    # The loop may be closed, if the server has shut down in between.
    with contextlib.suppress(RuntimeError):
      loop.call_soon_threadsafe(queue.put_nowait, item)

  def on_event(event: Event) -> None:
    nonlocal steps
    if left.is_set():
      raise ClientLeft
    steps += event['event'] == 'asked'
    for named in _public_events(event, steps):
      put(named)

  def answer() -> None:
    session.agent.on_event = on_event
    try:
      session.agent.ask(question)
    except ClientLeft:
      pass
    except Exception as e:
      put(('error', {'message': f'{type(e).__name__}: {e}', 'state': 'failed'}))
    finally:
      session.busy = False
      put(None)

  async def events() -> AsyncIterator[bytes]:
    try:
      yield _format('session', {'id': session.id})
      while (item := await queue.get()) is not None:
        yield _format(*item)
      yield _format('done', {})
    finally:
      left.set()

  threading.Thread(target=answer, daemon=True).start()
  return events()


def _public_events(
  event: Event, step: int
) -> Iterator[tuple[str, dict[str, Any]]]:
  """The events for clients that an event of the loop becomes."""
  match event:
    case {'event': 'asked', 'seconds': seconds}:
      yield 'step', {'number': step, 'seconds': seconds}
    case {'event': 'piece', 'text': text}:
      yield 'text_delta', {'text': text}
    case {'event': 'called', 'calls': calls}:
      for call in calls:
        yield 'tool_call', {'id': call['id'], **call['function']}
    case {'event': 'returned'}:
      names = ('id', 'name', 'text', 'failed')
      yield 'tool_result', {name: event[name] for name in names}
    case {'event': 'ended', 'outcome': outcome}:
      if outcome['state'] in _ANSWERED:
        yield 'answer', dict(outcome)
      else:
        yield 'error', {'message': outcome['why'], 'state': outcome['state']}


def _format(name: str, data: dict[str, Any]) -> bytes:
  text = json.dumps(data, ensure_ascii=False)
  return f'event: {name}\ndata: {text}\n\n'.encode(errors='replace')


async def _read_question(request: Request) -> Question:
  """Reads the body of POST /ask.

  Raises:
    RequestError: it is not a question in JSON, or too long.
  """
  # A page of another site cannot send this type without asking first.
  kind = request.headers.get('content-type', '').partition(';')[0].strip()
  if kind.lower() != 'application/json':
    raise RequestError(
      400, "send JSON, with the header 'Content-Type: application/json'", 'type'
    )
  raw = bytearray()
  async for chunk in request.stream():
    raw += chunk
    if len(raw) > _MAX_BODY:
      message = f'the body is longer than {_MAX_BODY:,} bytes'
      raise RequestError(413, message, 'body_too_long')
  try:
    return Question.model_validate(parse_json(bytes(raw), allow_nan=False))
  except Malformed as e:
    raise RequestError(400, f'the body is {e}', 'not_json') from None
  except pydantic.ValidationError as e:
    message = f'the body does not fit: {validation_message(e)}'
    raise RequestError(400, message, 'invalid') from None


async def _health(request: Request) -> Response:
  del request
  return JSONResponse({'status': 'alive'})


async def _error_response(request: Request, e: RequestError) -> Response:
  del request
  return e.response()


class _AccessCheck:
  """ASGI middleware that checks the host and the key; /health needs no key."""

  def __init__(self, app: ASGIApp, keys: ApiKeys, hosts: tuple[str, ...]):
    self._app, self._keys, self._hosts = app, keys, hosts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] == 'http' and (error := self._error(scope)):
      await error.response()(scope, receive, send)
    elif scope['type'] != 'websocket':
      await self._app(scope, receive, send)

  def _error(self, scope: Scope) -> RequestError | None:
    headers = dict(scope['headers'])
    host = headers.get(b'host', b'').decode('latin-1')
    if self._hosts and http_access.without_port(host) not in self._hosts:
      hosts = ', '.join(self._hosts)
      message = f'the host {host!r} is not one of {hosts}'
      return RequestError(403, message, 'wrong_host')
    authorized = self._keys.is_authorized(headers.get(b'authorization'))
    if scope['path'] != '/health' and not authorized:
      message = 'the key is missing or wrong; send Authorization: Bearer KEY'
      return RequestError(401, message, 'invalid_api_key')
    return None


def serve(agent: Agent, host: str, port: int, keys: ApiKeys) -> None:
  """Serves an agent until SIGINT or SIGTERM.

  Raises:
    ValueError: the address is in use, or reachable from other machines while
      there are no keys.
  """
  if not keys.users and not http_access.is_loopback(host):
    raise ValueError(
      f'--host={host} is reachable from other machines, and there are no keys; '
      'name a file of keys with --serve_key_file'
    )
  listener = http_access.listen(host, port)
  hosts = http_access.accepted_hosts(host, keys)
  config = uvicorn.Config(
    AgentServer(agent).app(keys, hosts),
    ws='none',
    lifespan='off',
    log_config=None,
    access_log=False,
    server_header=False,
    limit_concurrency=_MAX_CONNECTIONS,
    h11_max_incomplete_event_size=_MAX_HEAD,
    timeout_graceful_shutdown=5,
  )
  url = http_access.base_url(host, listener.getsockname()[1])
  print(f'serving at {url}', flush=True)
  uvicorn.Server(config).run(sockets=[listener])
