# SPDX-License-Identifier: Apache-2.0
"""Traces: all that an agent did, a JSON object a line, and its replay."""

import datetime
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.agent.agent import Agent
from moepeft.agent.calls import Result
from moepeft.agent.loop import Budget, Event, Outcome, Tell, ignore
from moepeft.agent.memory import Memory
from moepeft.agent.model import Failed, Late, Reply
from moepeft.agent.tools import Tool


class Trace:
  """Writes events as they come; give it to an agent as `tell`.

  Pieces of text are left out, as the reply has them all. A request's headers,
  where a key is, are in no event; keys that a tool or a server might say are
  given as `secrets` and hidden.
  """

  def __init__(self, path: str, secrets: Sequence[str] = ()):
    """Opens a file to append to.

    Raises:
      OSError: it cannot be written.
    """
    self._file = open(path, 'a', encoding='utf-8')
    # As they stand inside a JSON string.
    self._secrets = [_json(text)[1:-1] for text in secrets if text]

  def __call__(self, event: Event) -> None:
    if event['event'] == 'piece':
      return
    now = datetime.datetime.now(datetime.UTC)
    line = _json({'at': now.isoformat(timespec='milliseconds'), **event})
    for secret in self._secrets:
      line = line.replace(secret, '[hidden]')
    print(line, file=self._file, flush=True)

  def close(self) -> None:
    """No more events."""
    self._file.close()


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False, default=str)


def read(path: str) -> list[dict[str, Any]]:
  """The rows of a trace; a torn last line, which a kill left, is passed over.

  Raises:
    ValueError: another line is no event. OSError: it cannot be read.
  """
  rows = []
  with open(path, encoding='utf-8') as lines:
    for number, line in enumerate(lines, 1):
      if not line.endswith('\n'):
        break
      try:
        row = json.loads(line)
        row['event']
      except (ValueError, KeyError, TypeError):
        raise ValueError(
          f'line {number} of {path} is no event of a trace; remove it'
        ) from None
      rows.append(row)
  return rows


def replay(path: str, tell: Tell = ignore) -> list[Outcome]:
  """Runs a trace's questions again with what was recorded.

  The loop is the real one; the model, the tools, the clock and the counts of
  tokens are the trace's. So `tell` is told what happened without a server, and
  that the loop of today would do the same. Returns the outcome of each question
  that ended.

  Raises:
    ValueError: the trace is broken, or the loop asks for something else than
      it did; the message says where.
  """
  outcomes, memory = [], Memory()
  for rows in _questions(read(path)):
    first, was = rows[0], Outcome(**rows[-1]['outcome'])
    settings, tape = dict(first['settings']), _Tape(rows)
    limit = settings.pop('memory')
    memory = memory if first['earlier'] else Memory(limit)
    memory.count = tape.count
    agent = Agent(
      tape.model,
      [Tool(*parts, run=str) for parts in settings.pop('tools')],
      memory=memory,
      budget=Budget(**settings.pop('budget')),
      tell=tell,
      clock=tape.clock,
      run_calls=tape.results,
      **settings,
    )
    outcome = agent.ask(first['question'])
    if outcome != was:
      raise ValueError(
        f'the replay ends as {outcome}, the trace as {was}; the loop has '
        'changed since'
      )
    outcomes.append(outcome)
  return outcomes


def _questions(rows: Sequence[Mapping]) -> list[list[Mapping]]:
  """The rows of each question that ended; one that broke off is left out."""
  found: list[list[Mapping]] = []
  for row in rows:
    if row['event'] == 'started':
      found.append([])
    if not found:
      raise ValueError('the trace does not begin with a question')
    found[-1].append(row)
  return [own for own in found if own[-1]['event'] == 'ended']


class _Tape:
  """The rows of a question, each kind in order, as the parts of an agent."""

  def __init__(self, rows: Sequence[Mapping[str, Any]]):
    self._rows: dict[str, deque] = {}
    for row in rows:
      self._rows.setdefault(row['event'], deque()).append(row)
    asked = [row['seconds'] for row in self._rows.get('asked', ())]
    self._times = deque([0.0, *asked, rows[-1]['outcome']['seconds']])

  def _take(self, kind: str) -> Mapping[str, Any]:
    if not self._rows.get(kind):
      raise ValueError(
        f'the replay does more than the trace: there is no further {kind!r}'
      )
    return self._rows[kind].popleft()

  def clock(self) -> float:
    return self._times.popleft() if len(self._times) > 1 else self._times[0]

  def count(self, request) -> int:
    return self._take('counted')['tokens']

  def model(self, request, piece, seconds) -> Reply:
    was = self._take('asked')['request']
    if where := _difference(was, json.loads(_json(request)), 'request'):
      raise ValueError(f'the replay does not ask what the trace did: {where}')
    row = self._take('replied')
    if 'error' in row:
      raise (Late if row['late'] else Failed)(row['error'])
    piece(row['message']['content'])
    keys = ('message', 'reason', 'tokens', 'estimated')
    return Reply(**{key: row[key] for key in keys})

  def results(self, tools, calls, seconds, output) -> list[Result]:
    rows = [dict(self._take('returned')) for _ in calls]
    keys = ('id', 'name', 'arguments', 'text', 'failed', 'trusted')
    return [Result(**{key: row[key] for key in keys}) for row in rows]


def _difference(was: Any, now: Any, where: str) -> str:
  """Where two JSON values first differ; '' where they do not."""
  if isinstance(was, list) and isinstance(now, list):
    was, now = dict(enumerate(was)), dict(enumerate(now))
  if not (isinstance(was, dict) and isinstance(now, dict)):
    return '' if was == now else f'{where} was {was!r:.80}, is {now!r:.80}'
  parts = (
    _difference(was.get(key), now.get(key), f'{where}[{key!r}]')
    for key in {**was, **now}
  )
  return next(filter(None, parts), '')
