# SPDX-License-Identifier: Apache-2.0
"""The server's lines on standard error: its start, its address and its log."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from moepeft.core import secrets, terminal
from moepeft.core.http_access import ApiKeys
from moepeft.inference.api import LoadedAdapter

# Seconds between two lines if the output is not a terminal.
_PRINT_INTERVAL = 10.0


class Formatter(logging.Formatter):
  """Redacts secrets and escapes control characters, also in tracebacks."""

  def format(self, record: logging.LogRecord) -> str:
    return terminal.visible(secrets.redact(super().format(record)))


def start_log(access: bool) -> None:
  """Logs uvicorn's warnings and the server's.

  Args:
    access: whether to log requests, too.
  """
  handler = logging.StreamHandler()
  line_format = '%(asctime)s %(levelname).1s %(message)s'
  handler.setFormatter(Formatter(line_format, '%H:%M:%S'))
  for name, level in (
    ('moepeft.serve', logging.INFO if access else logging.WARNING),
    ('uvicorn', logging.WARNING),
  ):
    log = logging.getLogger(name)
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


class StartupProgress:
  """Prints the progress of compiling the programs.

  On a terminal it overwrites one line; otherwise it prints a line at intervals.
  """

  def __init__(self, out: TextIO = sys.stderr):
    self._out, self._started, self._printed_at = out, time.monotonic(), 0.0

  def __call__(self, stage: str, done: int, count: int) -> None:
    """The progress callback of `Engine.start`."""
    seconds = time.monotonic() - self._started
    line = f'compiling {done + 1} of {count}: {stage} ({seconds:.0f} s)'
    if self._out.isatty():
      print(f'\r\x1b[K{line}', end='', file=self._out, flush=True)
    elif not self._printed_at or seconds - self._printed_at > _PRINT_INTERVAL:
      self._printed_at = max(seconds, 1e-9)
      print(line, file=self._out, flush=True)

  def done(self, lines: Sequence[str]) -> None:
    """Prints the startup time and lines in a box."""
    clear = '\r\x1b[K' if self._out.isatty() else ''
    seconds = time.monotonic() - self._started
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
  """The lines that describe the running server."""
  rows = [f'page      {url}/', f'API       {url}/v1', f'model     {model}']
  for i, adapter in enumerate(adapters):
    rows.append(f'{"" if i else "adapters":10}{adapter.name}: {adapter.method}')
  if not adapters:
    rows.append('adapters  none')
  if embeddings:
    rows.append(f'vectors   {embeddings}')
  if keys.users:
    rows.append(f'key       needed, one of {len(keys.users)}')
  else:
    rows.append(
      'key       none: every client that reaches the address is served'
    )
  loads = 'with an admin key' if keys.admins else 'off (--admin_key_file)'
  return [*rows, f'loading   {loads}']
