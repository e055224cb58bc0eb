# SPDX-License-Identifier: Apache-2.0
"""The board's HTTP API: the runs, and the processes that it starts for them.

Every request of the API but the page itself needs the key, where there is one.
A request names runs, settings and formats; the commands are made here.
"""

import asyncio
import json
import logging
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from ml_collections import ConfigDict
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from moepeft import registries
from moepeft.board import chat, runs, settings
from moepeft.board.folders import Folders
from moepeft.board.jobs import Jobs
from moepeft.checkpoints import formats
from moepeft.config import check as config_check
from moepeft.config import command_line
from moepeft.core import files, pages
from moepeft.core.http_access import ApiKeys
from moepeft.peft.methods import METHODS
from moepeft.runs.run import Run
from moepeft.serve.http import access
from moepeft.serve.http.body import ClientDisconnected, read_body
from moepeft.serve.http.errors import (
  ApiError,
  invalid_request,
  server_error,
  unavailable,
)

_LOG = logging.getLogger('moepeft.board')
_PAGE = os.path.join(os.path.dirname(__file__), 'index.html')
_MAX_BODY = 1 << 20
_PREVIEW_ROWS = 8
# Seconds in which a link to a report can be opened.
_TICKET_SECONDS = 60
# Formats of moepeft.convert; GGUF files are only read.
EXPORTS = tuple(name for name in formats.FORMATS if name != 'gguf')
_REPORT_HEADERS = {
  'Content-Type': 'text/html; charset=utf-8',
  # A report is a file of a run, which anybody may have made: it reaches no API
  # and no key of the board.
  'Content-Security-Policy': "sandbox allow-scripts; frame-ancestors 'none'",
}
_HEADERS = {
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
  'Cache-Control': 'no-store',
}


class _Body(BaseModel):
  model_config = {'extra': 'forbid', 'strict': True}


class NameBody(_Body):
  """The name of a run."""

  name: str


class SettingsBody(_Body):
  """Settings of a form, {key of the config: text of its value}."""

  settings: dict[str, str]
  name: str = ''


class StopBody(_Body):
  """A process of a run."""

  name: str
  kind: Literal['train', 'routing', 'export', 'chat']
  force: bool = False


class ExportBody(_Body):
  """A run, and the format to export it in."""

  name: str
  format: Literal[EXPORTS]


class ChatMessage(_Body):
  """A turn of a conversation."""

  role: Literal['system', 'user', 'assistant']
  content: str


class ChatBody(_Body):
  """A question to a run or to its base."""

  name: str
  model: Literal[chat.BASE, chat.TRAINED]
  messages: list[ChatMessage] = Field(min_length=1)
  max_tokens: int = Field(128, ge=1, le=100_000)
  temperature: float = Field(0.0, ge=0, le=2)


class Board:
  """The state that the routes share.

  Attributes:
    folders: those that it may read and write.
    jobs: the processes that it starts.
  """

  def __init__(self, folders: Folders):
    self.folders = folders
    self.jobs = Jobs(os.path.join(folders.board, 'jobs'))
    # Data is opened for one preview at a time.
    self._previews = threading.Lock()
    self._tickets: dict[str, tuple[str, float]] = {}

  def overview(self) -> dict[str, Any]:
    """The runs, and the choices of the form."""
    return {
      'workdirs': self.folders.relative(self.folders.workdirs),
      'runs': runs.states(self.folders, self.jobs),
    }

  def choices(self) -> dict[str, Any]:
    """The names that the form offers, and the default of each setting."""
    return {
      'presets': list(settings.preset_files()),
      'methods': sorted(METHODS),
      'sources': sorted(registries.BY_KEY['data.source']),
      'objectives': sorted(registries.BY_KEY['objective']),
      'formats': list(EXPORTS),
      'defaults': settings.defaults(),
    }

  def checked(self, body: SettingsBody) -> dict[str, Any]:
    """The config and the command of settings, which are checked.

    Raises:
      ValueError: they are none that a run could be started with.
    """
    run = self.folders.new_run(body.name)
    text = settings.render(self._check(body.settings, run.path))
    command = self._train(body.name, run)
    return {'config': text, 'command': shlex.join(command[1:])}

  def start(self, body: SettingsBody) -> None:
    run = self.folders.new_run(body.name)
    self._start(body.name, run, self._check(body.settings, run.path))

  def resume(self, name: str) -> None:
    run = self.folders.run(name)
    config = settings.stored_config(run)
    self.folders.check_paths(config)
    self._start(name, run, config)

  def preview(self, body: SettingsBody) -> dict[str, Any]:
    # Imports JAX's part of the data pipeline, which the table does not need.
    from moepeft.board import preview

    config = settings.make_config(body.settings)
    self.folders.check_paths(config)
    config_check.check(config, registries.BY_KEY)
    with self._previews:
      return preview.preview(config, _PREVIEW_ROWS)

  def export(self, body: ExportBody) -> None:
    run = self._trained(body.name)
    output = os.path.join(run.path, 'export', body.format)
    os.makedirs(os.path.dirname(output), exist_ok=True)
    self.jobs.start(
      *(body.name, 'export'),
      [
        *(sys.executable, '-m', 'moepeft.convert', f'--workdir={run.path}'),
        *(f'--output={output}', f'--to={body.format}', '--overwrite'),
      ],
    )

  def measure_routing(self, name: str) -> None:
    run = self._trained(name)
    output = os.path.dirname(runs.report_file(run))
    command = [sys.executable, '-m', 'moepeft.routing', run.path]
    self.jobs.start(name, 'routing', [*command, f'--output={output}'])

  def start_chat(self, name: str) -> None:
    command = chat.command(self.folders, self.folders.run(name))
    self.jobs.start(name, 'chat', command)

  def answer(self, body: ChatBody) -> Iterator[bytes]:
    """The stream of a chat or completion; raises as `chat.answer`."""
    state = chat.state(self.jobs, body.name, self.folders.run(body.name))
    question = {
      'model': body.model,
      'max_tokens': body.max_tokens,
      'temperature': body.temperature,
      'stream': True,
    }
    if state['chats']:
      question['messages'] = [m.model_dump() for m in body.messages]
    else:
      # Without a template, each question is asked alone.
      question['prompt'] = body.messages[-1].content
    path = '/v1/chat/completions' if state['chats'] else '/v1/completions'
    data = json.dumps(question).encode()
    return chat.answer(self.folders, self.jobs, body.name, path, data)

  def ticket(self, name: str) -> str:
    """A path that opens the report of a run for a minute.

    A link cannot send a key, so the path itself is secret.
    """
    path = runs.report_file(self.folders.run(name))
    if not os.path.exists(path):
      raise ValueError(f'the routing of the run {name!r} is not measured yet')
    now = time.monotonic()
    self._tickets = {
      key: value for key, value in self._tickets.items() if value[1] > now
    }
    ticket = secrets.token_urlsafe(24)
    self._tickets[ticket] = path, now + _TICKET_SECONDS
    return f'report/{ticket}'

  def report(self, ticket: str) -> bytes:
    path, end = self._tickets.get(ticket, ('', 0.0))
    if end < time.monotonic():
      raise ApiError(404, 'this link has expired; open it on the board again')
    return files.read_bytes(path)

  def _trained(self, name: str) -> Run:
    """A run whose checkpoints and base may be read."""
    run = self.folders.run(name)
    self.folders.check_paths(settings.stored_config(run))
    return run

  def _check(self, texts: Mapping[str, str], workdir: str) -> ConfigDict:
    """The config of settings, checked as moepeft.train checks it."""
    # At the first use, as its import defines the flags of moepeft.train.
    from moepeft import train

    config = settings.make_config(texts)
    self.folders.check_paths(config)
    try:
      train.check(config, workdir)
    except Exception as e:
      message = command_line.error_message(e)
      if message is None:
        raise
      raise ValueError(message) from None
    return config

  def _start(self, name: str, run: Run, config: ConfigDict) -> None:
    card = self.folders.card(name)
    text = settings.render(config)
    if self.jobs.state(name, 'train').get('running'):
      raise ValueError(f'the run {name!r} is running already')
    os.makedirs(os.path.dirname(card), exist_ok=True)
    os.makedirs(run.path, exist_ok=True)
    files.write_text(card, text)
    self.jobs.start(name, 'train', self._train(name, run))

  def _train(self, name: str, run: Run) -> list[str]:
    card, workdir = map(
      self.folders.relative, (self.folders.card(name), run.path)
    )
    flags = [f'--config={card}', f'--workdir={workdir}']
    return [sys.executable, '-m', 'moepeft.train', *flags]


def make_app(board: Board, keys: ApiKeys, hosts: tuple[str, ...]) -> FastAPI:
  """The ASGI application of a board.

  Args:
    keys: those of requests; without any, all requests are answered.
    hosts: accepted values of the header Host; () for any.
  """
  # Without documentation pages, which load scripts from other hosts.
  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  page = pages.read(_PAGE, "'self'")
  policy = pages.content_security_policy(page, "'self'")
  page_headers = {
    'Content-Security-Policy': f"{policy}; frame-ancestors 'none'"
  }

  def get(path: str, read: Callable[..., Any], *fields: str) -> None:
    @app.get(path, name=path)
    async def route(request: Request) -> Response:
      values = [request.query_params.get(field, '') for field in fields]
      return JSONResponse(await _call(read, *values))

  def post(path: str, schema: type[_Body], act: Callable[[Any], Any]) -> None:
    @app.post(path, name=path)
    async def route(request: Request) -> Response:
      body = await read_body(request, schema, _MAX_BODY)
      return JSONResponse(await _call(act, body) or {})

  @app.get('/')
  async def index() -> Response:
    return Response(page, media_type='text/html', headers=page_headers)

  @app.get('/report/{ticket}')
  async def report(ticket: str) -> Response:
    return Response(await _call(board.report, ticket), headers=_REPORT_HEADERS)

  @app.post('/api/ask')
  async def ask(request: Request) -> Response:
    body = await read_body(request, ChatBody, _MAX_BODY)
    chunks = await _call(board.answer, body)
    return StreamingResponse(chunks, media_type='text/event-stream')

  folders, jobs = board.folders, board.jobs
  get('/api/runs', board.overview)
  get('/api/choices', board.choices)
  get('/api/run', lambda name: runs.details(folders, jobs, name), 'name')
  get('/api/curves', lambda name: runs.curves(folders, name), 'name')
  get(
    *('/api/routing', lambda name, site: runs.routing(folders, name, site)),
    *('name', 'site'),
  )
  get('/api/tasks', lambda name: runs.tasks(folders, name), 'name')
  get(
    *('/api/chat', lambda name: chat.state(jobs, name, folders.run(name))),
    'name',
  )
  get('/api/preset', lambda name: settings.texts(settings.preset(name)), 'name')
  post('/api/check', SettingsBody, board.checked)
  post('/api/preview', SettingsBody, board.preview)
  post('/api/start', SettingsBody, board.start)
  post('/api/resume', NameBody, lambda body: board.resume(body.name))
  post(
    *('/api/stop', StopBody),
    lambda body: jobs.stop(body.name, body.kind, body.force),
  )
  post('/api/export', ExportBody, board.export)
  post(
    *('/api/routing', NameBody),
    lambda body: board.measure_routing(body.name),
  )
  post('/api/chat', NameBody, lambda body: board.start_chat(body.name))
  post(
    *('/api/report', NameBody), lambda body: {'url': board.ticket(body.name)}
  )
  app.add_exception_handler(ApiError, _error_response)
  app.add_middleware(Guard, keys=keys, hosts=hosts)
  return app


async def _error_response(request: Request, error: ApiError) -> Response:
  del request
  return error.response()


async def _call(function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function on a thread; what a user can correct becomes a 400."""
  try:
    return await asyncio.to_thread(function, *arguments)
  except (ValueError, OSError) as e:
    raise invalid_request(str(e)) from None


class Guard:
  """ASGI middleware that checks host, origin and key, and reports errors."""

  def __init__(self, app: ASGIApp, keys: ApiKeys, hosts: tuple[str, ...]):
    self._app, self._keys, self._hosts = app, keys, hosts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      return
    has_begun = False

    async def send_with_headers(message) -> None:
      nonlocal has_begun
      if message['type'] == 'http.response.start':
        has_begun = True
        headers = [
          (k.lower().encode(), v.encode()) for k, v in _HEADERS.items()
        ]
        message['headers'] = [*message.get('headers', ()), *headers]
      await send(message)

    try:
      self._check(scope)
      await self._app(scope, receive, send_with_headers)
    except ClientDisconnected:
      pass
    except ApiError as e:
      await e.response()(scope, receive, send_with_headers)
    except asyncio.CancelledError:
      # uvicorn cancels the requests that are left when it ends.
      if has_begun:
        raise
      error = unavailable('the board is shutting down', 10, 'draining')
      await error.response()(scope, receive, send_with_headers)
    except Exception:
      _LOG.exception('a request to %r failed', scope['path'])
      if not has_begun:
        error = server_error('the board failed; see its terminal')
        await error.response()(scope, receive, send_with_headers)

  def _check(self, scope: Scope) -> None:
    headers = dict(scope['headers'])
    access.check_host(self._hosts, headers)
    access.check_origin(headers)
    # The page asks for the key, and a report's path is one.
    if scope['path'] != '/' and not scope['path'].startswith('/report/'):
      access.check_key(self._keys, headers)
