# SPDX-License-Identifier: Apache-2.0
"""Traces: JSON lines of an agent's events, and their replay."""

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

# Models of the fields that a replay reads from each event, without conversion.
_STRICT = pydantic.ConfigDict(strict=True)


def _dataclass_model(dataclass: type) -> type[pydantic.BaseModel]:
  """A strict pydantic model of exactly the fields of a dataclass."""
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
    Malformed: a row is not an event, or lacks a field for a replay.
  """
  kind = field(row, 'event', str)
  if kind == 'replied' and 'error' in row:
    kind = 'failed'
  # A replay ignores other events, such as 'forgotten'.
  if kind in _EVENTS:
    try:
      _EVENTS[kind].model_validate(row)
    except pydantic.ValidationError as e:
      raise Malformed(f'{kind}: {validation_message(e)}') from None


class TraceWriter:
  """Appends events to a file; pass it to an agent as `on_event`.

  Pieces of text are omitted, as the reply has the whole text. Events have no
  HTTP headers, which contain the key. `secrets` in outputs of tools or servers
  are hidden.
  """

  def __init__(self, path: str, secrets: Sequence[str] = ()):
    """Opens the file.

    Raises:
      OSError: the file cannot be written.
    """
    files.check_file(path)
    self._file = open(path, 'a', encoding='utf-8')
    # In the form of a JSON string.
    self._secrets = [_json(text)[1:-1] for text in secrets if text]

  def __call__(self, event: Event) -> None:
    if event['event'] == 'piece':
      return
    actual = datetime.datetime.now(datetime.UTC)
    line = _json({'at': actual.isoformat(timespec='milliseconds'), **event})
    for secret in self._secrets:
      line = line.replace(secret, '[hidden]')
    print(line, file=self._file, flush=True)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _json(value: Any) -> str:
  # Safe to print in a terminal.
  text = json.dumps(value, ensure_ascii=False, default=str)
  return terminal.json_safe(text)


def read_trace(path: str) -> list[dict[str, Any]]:
  """Reads the rows of a trace; ignores an incomplete last line of a killed run.

  Raises:
    ValueError: another line is not an event.
    OSError: the file cannot be read.
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
  """Replays the questions of a trace without a server.

  The replay runs the real loop. Model, tools, clock and token counts come from
  the trace, and requests must equal the recorded ones.

  Returns:
    The outcome of each complete question.

  Raises:
    ValueError: the trace is damaged, or a request differs from the recorded
      one; the message says where.
  """
  outcomes, memory = [], Memory()
  for rows in _split_questions(read_trace(path)):
    first, recorded = rows[0], Outcome(**rows[-1]['outcome'])
    settings, recording = dict(first['settings']), _Recording(rows)
    limit = settings.pop('memory')
    memory = memory if first['earlier'] else Memory(limit)
    memory.count = recording.count
    agent = Agent(
      recording.model,
      [Tool(*parts, run=str) for parts in settings.pop('tools')],
      memory=memory,
      budget=Budget(**settings.pop('budget')),
      on_event=on_event,
      clock=recording.clock,
      run_calls=recording.results,
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
  """The rows of each complete question."""
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
  """Replaces the parts of an agent by the recorded rows of a question."""

  def __init__(self, rows: Sequence[Mapping[str, Any]]):
    self._rows: dict[str, deque] = {}
    for row in rows:
      self._rows.setdefault(row['event'], deque()).append(row)
    times = [row['seconds'] for row in self._rows.get('asked', ())]
    self._times = deque([0.0, *times, rows[-1]['outcome']['seconds']])

  def _next(self, kind: str) -> Mapping[str, Any]:
    if not self._rows.get(kind):
      raise ValueError(
        f'the replay does more than the trace: there is no further {kind!r}'
      )
    return self._rows[kind].popleft()

  def clock(self) -> float:
    return self._times.popleft() if len(self._times) > 1 else self._times[0]

  def count(self, request) -> int:
    return self._next('counted')['tokens']

  def model(self, request, piece, seconds) -> ChatReply:
    recorded = self._next('asked')['request']
    if path := _difference(recorded, json.loads(_json(request)), 'request'):
      raise ValueError(f'the replay does not ask what the trace did: {path}')
    row = self._next('replied')
    if 'error' in row:
      raise (ReplyTimeout if row['late'] else ReplyError)(row['error'])
    piece(row['message']['content'])
    keys = ('message', 'reason', 'tokens', 'estimated')
    return ChatReply(**{key: row[key] for key in keys})

  def results(self, tools, calls, seconds, output) -> list[ToolResult]:
    rows = [dict(self._next('returned')) for _ in calls]
    keys = ('id', 'name', 'arguments', 'text', 'failed', 'trusted')
    return [ToolResult(**{key: row[key] for key in keys}) for row in rows]


def _difference(recorded: Any, actual: Any, path: str) -> str:
  """The first difference of two JSON values, with its path; '' for none."""
  if isinstance(recorded, list) and isinstance(actual, list):
    recorded, actual = dict(enumerate(recorded)), dict(enumerate(actual))
  if not (isinstance(recorded, dict) and isinstance(actual, dict)):
    return (
      ''
      if recorded == actual
      else f'{path} was {recorded!r:.80}, is {actual!r:.80}'
    )
  parts = (
    _difference(recorded.get(key), actual.get(key), f'{path}[{key!r}]')
    for key in {**recorded, **actual}
  )
  return next(filter(None, parts), '')
