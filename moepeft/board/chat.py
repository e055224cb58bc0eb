# SPDX-License-Identifier: Apache-2.0
"""The servers that answer as a run and as its base: moepeft.serve, one a run.

A server listens on the loopback interface with a key of the board, which passes
its answers on.
"""

import os
import re
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from moepeft.board import settings
from moepeft.board.folders import Folders
from moepeft.board.jobs import Jobs
from moepeft.core import files, untrusted
from moepeft.data.readers import READERS
from moepeft.runs.run import Run
from moepeft.serve.http.errors import ApiError, unavailable

# The names of the two models of a server.
BASE, TRAINED = 'base', 'run'
# The line of the server's output that has its address; see `serve`.
_ADDRESS = re.compile(r'API +(http://\S+)/v1')
# Longer than the server's own limit of a request.
_SECONDS = 660
_CHUNK_BYTES = 4096


def command(folders: Folders, run: Run) -> list[str]:
  """The command of a run's server.

  Raises:
    ValueError: the run has no checkpoint yet, or a path of its config is
      outside of the board's folders.
  """
  config = settings.stored_config(run)
  folders.check_paths(config)
  if run.latest_step() is None:
    raise ValueError('the run has no checkpoint yet; wait for the first one')
  flags = {'quantise': config.model.quantize}
  if _is_chat(config):
    flags |= {
      'chat_template': config.data.chat_template,
      'system': config.data.system_prompt,
    }
  return [
    *(sys.executable, '-m', 'moepeft.serve', f'--model={config.model.path}'),
    *(f'--name={BASE}', f'--adapter={TRAINED}={run.path}'),
    *('--host=127.0.0.1', '--port=0', '--nopage', '--norouting', '--slots=2'),
    f'--api_key_file={key_file(folders)}',
    *(f'--{name}={value}' for name, value in flags.items() if value),
  ]


def _is_chat(config: ConfigDict) -> bool:
  # A user's own reader is not registered here.
  reader = READERS.get(config.data.source)
  return reader is not None and reader.uses_chat_template


def key_file(folders: Folders) -> str:
  """The file of the servers' key, which is made if needed."""
  path = os.path.join(folders.board, 'chat.key')
  os.makedirs(folders.board, exist_ok=True)
  try:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(path, flags, 0o600), 'w') as file:
      file.write(f'{secrets.token_urlsafe(32)}\n')
  except FileExistsError:
    pass
  return path


def state(jobs: Jobs, name: str, run: Run) -> dict[str, Any]:
  """The state of a run's server, its log, and whether it chats or completes."""
  config = settings.stored_config(run)
  result = jobs.state(name, 'chat')
  log = jobs.log(name, 'chat')
  return result | {
    'running': result.get('running', False),
    'ready': bool(result.get('running') and _ADDRESS.search(log)),
    'chats': _is_chat(config),
    'log': log[-2000:],
  }


def answer(
  folders: Folders, jobs: Jobs, name: str, path: str, body: bytes
) -> Iterator[bytes]:
  """Yields the server's answer to a request as it arrives.

  Args:
    path: of the server's API, '/v1/completions'.
    body: JSON.

  Raises:
    ApiError: the server is not ready, or it refused the request.
  """
  match = _ADDRESS.search(jobs.log(name, 'chat'))
  if match is None or not jobs.state(name, 'chat').get('running'):
    raise unavailable('the model of this run is not loaded', 2, 'starting')
  key = files.read_text(key_file(folders)).strip()
  request = urllib.request.Request(
    match[1] + path,
    body,
    {'Authorization': f'Bearer {key}', 'Content-Type': 'application/json'},
  )
  try:
    reply = _OPENER.open(request, timeout=_SECONDS)
  except urllib.error.HTTPError as e:
    raise ApiError(e.code, _message(e.read())) from None
  except OSError as e:
    raise unavailable(f'the server of this run is gone ({e})', 2, 'gone') from e
  return _chunks(reply)


# Without the proxies of the environment, and without redirects.
_OPENER = urllib.request.OpenerDirector()
_OPENER.add_handler(urllib.request.HTTPHandler())
_OPENER.add_handler(urllib.request.HTTPDefaultErrorHandler())
_OPENER.add_handler(urllib.request.HTTPErrorProcessor())


def _chunks(reply: Any) -> Iterator[bytes]:
  with reply:
    while chunk := reply.read1(_CHUNK_BYTES):
      yield chunk


def _message(body: bytes) -> str:
  try:
    error = untrusted.parse_json(body)
    return str(error['error']['message'])
  except (ValueError, KeyError, TypeError):
    return 'the server of this run failed; see its log'
