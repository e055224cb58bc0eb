# SPDX-License-Identifier: Apache-2.0
"""Traces: all that an agent did, a JSON object a line, and its replay."""

import dataclasses
import datetime
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from moepeft.agent.agent import FORMS, MODES, Agent
from moepeft.agent.chat_model import ChatReply, ReplyError, ReplyTimeout
from moepeft.agent.loop import Budget, Event, EventSink, Outcome, ignore_event
from moepeft.agent.memory import Memory
from moepeft.agent.tool_calls import ToolResult
from moepeft.agent.tools import Tool, validation_message
from moepeft.core import files, terminal
from moepeft.core.untrusted import Malformed, field, parse_json

# The fields that a replay reads, of each event. Their values are as they were
# written: nothing is converted.
_STRICT = pydantic.ConfigDict(strict=True)


def _dataclass_model(dataclass: type) -> type[pydantic.BaseModel]:
  """The fields of a dataclass, all of them and no others."""
  fields = {
    field.name: (field.type, ...) for field in dataclasses.fields(dataclass)
  }
  config = pydantic.ConfigDict(strict=True, extra='forbid')
  return pydantic.create_model(dataclass.__name__, __config__=config, **fields)


class _Settings(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(strict=True, extra='forbid')
  system: str
  form: Literal[FORMS]
  mode: Literal[MODES]
  options: dict[str, Any]
  memory: int | None
  budget: _dataclass_model(Budget)
  # A list in JSON.
  tools: list[
    Annotated[tuple[str, str, dict[str, Any]], pydantic.Field(strict=False)]
  ]


class _Function(pydantic.BaseModel):
  model_config = _STRICT
  name: str
  arguments: str


class _Call(pydantic.BaseModel):
  model_config = _STRICT
  id: str
  function: _Function


class _Message(pydantic.BaseModel):
  model_config = _STRICT
  role: Literal['assistant']
  content: str
  tool_calls: list[_Call] = []


def _event_model(event: str, /, **fields: Any) -> type[pydantic.BaseModel]:
  definitions = {key: (kind, ...) for key, kind in fields.items()}
  kind = (Literal[event], ...)
  return pydantic.create_model(
    event, __config__=_STRICT, event=kind, **definitions
  )


_EVENTS = {
  'started': _event_model(
    'started', question=str, earlier=int, settings=_Settings
  ),
  'counted': _event_model('counted', tokens=int),
  'asked': _event_model('asked', request=dict[str, Any], seconds=float),
  'replied': _event_model(
    'replied', message=_Message, reason=str, tokens=int, estimated=bool
  ),
  'failed': _event_model('replied', error=str, late=bool),
  'called': _event_model('called', calls=list[_Call]),
  'returned': _event_model(
    'returned',
    id=str,
    name=str,
    arguments=str,
    text=str,
    failed=bool,
    trusted=bool,
  ),
  'ended': _event_model('ended', outcome=_dataclass_model(Outcome)),
}


def _check_event(row: Any) -> None:
  """
  Raises:
    Malformed: a row is no event, or lacks what a replay reads.
  """
  kind = field(row, 'event', str)
  if kind == 'replied' and 'error' in row:
    kind = 'failed'
  # Other events, as 'forgotten', are of no use to a replay.
  if kind in _EVENTS:
    try:
      _EVENTS[kind].model_validate(row)
    except pydantic.ValidationError as e:
      raise Malformed(f'{kind}: {validation_message(e)}') from None


class TraceWriter:
  """Writes events as they come; give it to an agent as `on_event`.

  Pieces of text are left out, as the reply has them all. A request's headers,
  where a key is, are in no event; keys that a tool or a server might say are
  given as `secrets` and hidden.
  """

  def __init__(self, path: str, secrets: Sequence[str] = ()):
    """Opens a file to append to.

    Raises:
      OSError: it cannot be written.
    """
    files.check_file(path)
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
  # So that a trace can be looked at in a terminal.
  text = json.dumps(value, ensure_ascii=False, default=str)
  return terminal.json_safe(text)


def read_trace(path: str) -> list[dict[str, Any]]:
  """The rows of a trace; a torn last line, which a kill left, is passed over.

  Raises:
    ValueError: another line is no event. OSError: it cannot be read.
  """
  rows = []
  with files.open_file(path) as lines:
    for number, line in enumerate(lines, 1):
      if not line.endswith(b'\n'):
        break
      try:
        row = parse_json(line)
        _check_event(row)
      except Malformed as e:
        raise ValueError(
          f'line {number} of {path} is no event of a trace ({e}); remove it'
        ) from None
      rows.append(row)
  return rows


def replay_trace(
  path: str, on_event: EventSink = ignore_event
) -> list[Outcome]:
  """Runs a trace's questions again with what was recorded.

  The loop is the real one; the model, the tools, the clock and the counts of
  tokens come from the trace. `on_event` receives the events without a server,
  and today's loop is checked against the recorded one. Returns the outcome of
  each question
  that ended.

  Raises:
    ValueError: the trace is broken, or the loop asks for something else than
      it did; the message says where.
  """
  outcomes, memory = [], Memory()
  for rows in _split_questions(read_trace(path)):
    first, recorded = rows[0], Outcome(**rows[-1]['outcome'])
    settings, tape = dict(first['settings']), _Recording(rows)
    limit = settings.pop('memory')
    memory = memory if first['earlier'] else Memory(limit)
    memory.count = tape.count
    agent = Agent(
      tape.model,
      [Tool(*parts, run=str) for parts in settings.pop('tools')],
      memory=memory,
      budget=Budget(**settings.pop('budget')),
      on_event=on_event,
      clock=tape.clock,
      run_calls=tape.results,
      **settings,
    )
    outcome = agent.ask(first['question'])
    if outcome != recorded:
      raise ValueError(
        f'the replay ends as {outcome}, the trace as {recorded}; the loop has '
        'changed since'
      )
    outcomes.append(outcome)
  return outcomes


def _split_questions(rows: Sequence[Mapping]) -> list[list[Mapping]]:
  """The rows of each question that ended; one that broke off is left out."""
  questions: list[list[Mapping]] = []
  for row in rows:
    if row['event'] == 'started':
      questions.append([])
    if not questions:
      raise ValueError('the trace does not begin with a question')
    questions[-1].append(row)
  return [
    question for question in questions if question[-1]['event'] == 'ended'
  ]


class _Recording:
  """The rows of a question, each kind in order, as the parts of an agent."""

  def __init__(self, rows: Sequence[Mapping[str, Any]]):
    self._rows: dict[str, deque] = {}
    for row in rows:
      self._rows.setdefault(row['event'], deque()).append(row)
    times = [row['seconds'] for row in self._rows.get('asked', ())]
    self._times = deque([0.0, *times, rows[-1]['outcome']['seconds']])

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

  def model(self, request, piece, seconds) -> ChatReply:
    recorded = self._take('asked')['request']
    if where := _difference(recorded, json.loads(_json(request)), 'request'):
      raise ValueError(f'the replay does not ask what the trace did: {where}')
    row = self._take('replied')
    if 'error' in row:
      raise (ReplyTimeout if row['late'] else ReplyError)(row['error'])
    piece(row['message']['content'])
    keys = ('message', 'reason', 'tokens', 'estimated')
    return ChatReply(**{key: row[key] for key in keys})

  def results(self, tools, calls, seconds, output) -> list[ToolResult]:
    rows = [dict(self._take('returned')) for _ in calls]
    keys = ('id', 'name', 'arguments', 'text', 'failed', 'trusted')
    return [ToolResult(**{key: row[key] for key in keys}) for row in rows]


def _difference(recorded: Any, now: Any, where: str) -> str:
  """The first difference of two JSON values, with its path; '' for none."""
  if isinstance(recorded, list) and isinstance(now, list):
    recorded, now = dict(enumerate(recorded)), dict(enumerate(now))
  if not (isinstance(recorded, dict) and isinstance(now, dict)):
    return (
      '' if recorded == now else f'{where} was {recorded!r:.80}, is {now!r:.80}'
    )
  parts = (
    _difference(recorded.get(key), now.get(key), f'{where}[{key!r}]')
    for key in {**recorded, **now}
  )
  return next(filter(None, parts), '')
