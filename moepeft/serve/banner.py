# SPDX-License-Identifier: Apache-2.0
"""The command's output: how far its start is, how to ask, and its log."""

import logging
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from moepeft.core import secrets, terminal
from moepeft.inference.api import Loaded
from moepeft.serve.http.keys import Keys

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
    """What `protocol.Engine.start` calls."""
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
  adapters: Sequence[Loaded],
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
