# SPDX-License-Identifier: Apache-2.0
"""Traces: all that an agent did, a JSON object a line, and its replay."""

import dataclasses
import datetime
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from moepeft.agent import events
from moepeft.agent.agent import Agent
from moepeft.agent.calls import Limits, Result
from moepeft.agent.events import Event, Outcome, Tell, ignore
from moepeft.agent.loop import Budget
from moepeft.agent.memory import AROUND, Memory, digest
from moepeft.agent.model import Call, Failed, Late, Reply
from moepeft.agent.tools import Tool

_HIDDEN = '[hidden]'


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
    self._secrets = [_inside(text) for text in secrets if text]

  def __call__(self, event: Event) -> None:
    if isinstance(event, events.Piece):
      return
    now = datetime.datetime.now(datetime.UTC)
    row = {
      'at': now.isoformat(timespec='milliseconds'),
      'event': type(event).__name__.lower(),
      **dataclasses.asdict(event),
    }
    line = json.dumps(row, ensure_ascii=False, default=str)
    for secret in self._secrets:
      line = line.replace(secret, _HIDDEN)
    print(line, file=self._file, flush=True)

  def close(self) -> None:
    """No more events."""
    self._file.close()


def _inside(text: str) -> str:
  """A text as it stands inside a JSON string."""
  return json.dumps(text, ensure_ascii=False)[1:-1]


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
  tokens are the trace's. So it shows what happened without a server, and
  that the loop of today would do the same.

  Args:
    tell: is told the events.

  Returns:
    an outcome for each question that ended.

  Raises:
    ValueError: the trace is broken, or the loop asks for something else than
      it did; the message says where.
  """
  outcomes, agent, every = [], None, read(path)
  counts = {
    row['digest']: row['tokens'] for row in every if row['event'] == 'counted'
  }
  for rows in _questions(every):
    tape = _Tape(rows)
    if agent is None or rows[0]['earlier'] == 0:
      agent = _Replaying(rows[0]['settings'], counts, tell)
    outcome = agent.ask(rows[0]['question'], tape)
    was = Outcome(**rows[-1]['outcome'])
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


class _Replaying:
  """An agent with recorded parts, over the questions of one conversation."""

  def __init__(
    self, settings: Mapping[str, Any], counts: Mapping[str, int], tell: Tell
  ):
    self._tape = _Tape(())
    memory = Memory(
      settings['memory'],
      lambda text: counts.get(digest(text), AROUND) - AROUND,
      (lambda lost: self._tape.take('forgotten')['summary'])
      if settings['summarised']
      else None,
    )
    self._agent = Agent(
      self._model,
      [
        Tool(name, about, schema, _never)
        for name, about, schema in settings['tools']
      ],
      settings['system'],
      memory,
      settings['form'],
      settings['mode'],
      Budget(**settings['budget']),
      Limits(**settings['limits']),
      settings['options'],
      tell,
      lambda: self._tape.now(),
      self._results,
    )

  def ask(self, question: str, tape: '_Tape') -> Outcome:
    self._tape = tape
    return self._agent.ask(question)

  def _model(self, request, piece, seconds) -> Reply:
    was = self._tape.take('asked')['request']
    if where := _difference(was, json.loads(json.dumps(request)), 'request'):
      raise ValueError(f'the replay does not ask what the trace did: {where}')
    row = self._tape.take('replied')
    if row['reply'] is None:
      raise (Late if row['late'] else Failed)(row['error'])
    calls = tuple(Call(**call) for call in row['reply'].pop('calls'))
    reply = Reply(calls=calls, **row['reply'])
    piece(reply.text)
    return reply

  def _results(self, tools, calls, limits) -> list[Result]:
    rows = [self._tape.take('returned')['result'] for _ in calls]
    return [Result(call=Call(**row.pop('call')), **row) for row in rows]


class _Tape:
  """The rows of a question, taken in order, each kind by itself."""

  def __init__(self, rows: Sequence[Mapping[str, Any]]):
    self._rows: dict[str, deque] = {}
    for row in rows:
      self._rows.setdefault(row['event'], deque()).append(row)
    times = [row['seconds'] for row in self._rows.get('asked', ())]
    ends = [row['outcome']['seconds'] for row in self._rows.get('ended', ())]
    self._times = deque([0.0, *times, *ends])

  def take(self, kind: str) -> dict[str, Any]:
    if not self._rows.get(kind):
      raise ValueError(
        f'the replay does more than the trace: there is no further {kind!r}'
      )
    return dict(self._rows[kind].popleft())

  def now(self) -> float:
    return self._times.popleft() if len(self._times) > 1 else self._times[0]


def _never(text: str, seconds: float) -> str:
  raise AssertionError('a replay runs no tools')


def _difference(was: Any, now: Any, where: str) -> str:
  """Where two JSON values first differ; '' where they do not."""
  if isinstance(was, dict) and isinstance(now, dict):
    for key in [*was, *(key for key in now if key not in was)]:
      if key not in was or key not in now:
        return f'{where}.{key} is only in one of them'
      if found := _difference(was[key], now[key], f'{where}.{key}'):
        return found
    return ''
  if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
    for i, (old, new) in enumerate(zip(was, now, strict=True)):
      if found := _difference(old, new, f'{where}[{i}]'):
        return found
    return ''
  return '' if was == now else f'{where} was {was!r:.80}, is {now!r:.80}'
