# SPDX-License-Identifier: Apache-2.0
"""python -m moepeft.board --workdirs=workdirs: a page of all runs.

It shows their states, curves and routers, compares them, starts, stops and
resumes them, previews their data, chats with a checkpoint beside its base, and
exports it.

The board listens on the loopback interface; another --host needs API keys. Runs
go on when it ends, and a board that is started again shows them.
"""

import logging
import os
import signal

import jax
import uvicorn
from absl import flags

from moepeft.board.app import Board, make_app
from moepeft.board.folders import Folders
from moepeft.config import command_line
from moepeft.core import http_access
from moepeft.core.http_access import ApiKeys
from moepeft.serve import terminal_output
from moepeft.serve.http import server
from moepeft.serve.http.connection import (
  ConnectionLimits,
  reserve_file_descriptors,
)

# Seconds for open requests when the board ends.
_CLOSE_SECONDS = 3


def read_api_keys(host: str, path: str) -> ApiKeys:
  """Reads the file of API keys.

  Raises:
    ValueError: it is invalid, or missing where other machines reach the board.
  """
  keys = ApiKeys(http_access.read_keys(path, 'api_key_file'))
  if not (http_access.is_loopback(host) or keys.users):
    raise ValueError(
      f'--host={host} is reachable from other machines, and who reaches the '
      'board can start programs; name a file of keys with --api_key_file'
    )
  return keys


def main(argv) -> None:
  del argv
  host, keys = _HOST.value, read_api_keys(_HOST.value, _API_KEYS.value)
  workdirs = os.path.expanduser(_WORKDIRS.value)
  for folder in _DATA.value or ():
    if not os.path.isdir(os.path.expanduser(folder)):
      raise ValueError(f'--data={folder}: there is no such folder')
  os.makedirs(workdirs, exist_ok=True)
  # Checks and previews need no accelerator, and runs need all of its memory.
  jax.config.update('jax_platforms', 'cpu')
  board = Board(Folders(workdirs, _DATA.value or ()))
  app = make_app(board, keys, http_access.accepted_hosts(host, keys))
  limits = reserve_file_descriptors(ConnectionLimits())
  sock = http_access.listen(host, _PORT.value)
  logging.getLogger('moepeft.board').addHandler(_log_handler())
  url = http_access.base_url(host, sock.getsockname()[1])
  key = f'needed, one of {len(keys.users)}' if keys.users else 'none'
  print(f'board  {url}/\nruns   {workdirs}\nkey    {key}', flush=True)
  config = server.make_config(app, limits, _CLOSE_SECONDS)
  # uvicorn raises the signal that ended it again, at its end.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    uvicorn.Server(config).run([sock])
  finally:
    board.jobs.close('chat')


def _log_handler() -> logging.Handler:
  handler = logging.StreamHandler()
  handler.setFormatter(terminal_output.Formatter('%(levelname).1s %(message)s'))
  return handler


if __name__ == '__main__':
  _WORKDIRS = flags.DEFINE_string(
    'workdirs', 'workdirs', 'The folder of the runs.'
  )
  _DATA = flags.DEFINE_multi_string(
    'data', None, 'A folder of data or models that runs may read; repeatable.'
  )
  _HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'The address to listen on; 0.0.0.0 for all, with keys.'
  )
  _PORT = flags.DEFINE_integer(
    'port',
    7860,
    'The port to listen on; 0 for any.',
    lower_bound=0,
    upper_bound=65535,
  )
  _API_KEYS = flags.DEFINE_string(
    'api_key_file', '', 'A file of API keys, one a line.'
  )
  command_line.run(main)
