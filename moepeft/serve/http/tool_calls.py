# SPDX-License-Identifier: Apache-2.0
"""Calls of tools in chat: what is asked for, forced, and read out of text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moepeft.data.chat.formats import Conversation
from moepeft.inference.api import Constraint, EngineFull
from moepeft.inference.tools import parser as calls
from moepeft.inference.tools import tools
from moepeft.serve.http.errors import refused, wrong
from moepeft.serve.http.requests import Watched
from moepeft.serve.http.service import Compiler


class Plain:
  """The reader of answers without tools: all of the text is content."""

  called = False

  def feed(self, text: str) -> list[dict[str, Any]]:
    return [{'content': text}] if text else []

  def finish(self) -> list[dict[str, Any]]:
    return []


def message(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """OpenAI's message: null content where there are calls alone."""
  text, calls = '', []
  for delta in deltas:
    text += delta.get('content', '')
    for part in delta.get('tool_calls', ()):
      if 'id' in part:
        own = {'name': part['function']['name'], 'arguments': ''}
        calls.append({'id': part['id'], 'type': 'function', 'function': own})
      function = calls[part['index']]['function']
      function['arguments'] += part['function']['arguments']
  found = {'role': 'assistant', 'content': text, 'refusal': None}
  if calls:
    found |= {'content': text or None, 'tool_calls': calls}
  return found


class Calling:
  """Implements `service.Calling` by `moepeft.inference.tools.tools`."""

  def __init__(self, compiler: Compiler | None):
    """
    Args:
      compiler: None where calls cannot be forced to their form.
    """
    self._compiler = compiler

  def plan(
    self, found: list, choice: Any, parallel: bool, template: str
  ) -> 'Plan | None':
    """What a request with tools comes to; None where none may be called.

    Args:
      found, choice: OpenAI's `tools` and `tool_choice`.
      template: of the model.

    Raises:
      Problem: one of them is wrong, or cannot be.
    """
    try:
      some = tools.check(found)
      chosen = tools.chosen(choice, some)
      if chosen.mode == 'none':
        return None
      style = tools.style_of(template)
    except ValueError as e:
      raise wrong(str(e), 'tools') from None
    if self._compiler is None and chosen.mode == 'required':
      raise wrong(
        "a tool's call is forced by llguidance, which is not installed here; "
        "run pip install 'moepeft[serve]', or set tool_choice to 'auto'",
        'tool_choice',
      )
    several = parallel and not chosen.once
    return Plan(some, chosen, style, several, template, self._compiler)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Tools of one request; see `service.Plan`."""

  tools: tuple[tools.Tool, ...]
  choice: tools.Choice
  style: tools.Style
  parallel: bool
  template: str
  compiler: Compiler | None

  @property
  def free(self) -> bool:
    """Whether the answer may be text."""
    return self.choice.mode == 'auto'

  def offered(self, talk: Conversation) -> Conversation:
    return tools.offered(
      talk, self.tools, self.choice, self.style, self.template
    )

  def constraint(self) -> Constraint | None:
    if self.compiler is None:
      return None
    try:
      return Watched(
        self.compiler.tools(self.tools, self.choice, self.parallel, self.style)
      )
    except EngineFull as e:
      raise refused(e, 'tools') from None
    except ValueError as e:
      raise wrong(str(e), 'tools') from None

  def reader(self) -> 'Reader':
    return Reader(
      calls.Parser(
        self.style,
        self.choice.names,
        sure=self.compiler is not None,
        forced=self.compiler is not None and not self.free,
      )
    )


class Reader:
  """An answer's text as the deltas of chat, while it comes.

  Attributes:
    called: whether a tool was.
  """

  def __init__(self, parser: calls.Parser):
    self._parser, self.called = parser, False

  def feed(self, text: str) -> list[dict[str, Any]]:
    return self._deltas(self._parser.feed(text))

  def finish(self) -> list[dict[str, Any]]:
    return self._deltas(self._parser.finish())

  def _deltas(self, events: list[calls.Event]) -> list[dict[str, Any]]:
    self.called |= any(isinstance(event, calls.Call) for event in events)
    return [_delta(event) for event in events]


def _delta(event: calls.Event) -> dict[str, Any]:
  if isinstance(event, calls.Content):
    return {'content': event.text}
  if isinstance(event, calls.Arguments):
    function = {'arguments': event.text}
    return {'tool_calls': [{'index': event.index, 'function': function}]}
  call = {
    'index': event.index,
    'id': event.id,
    'type': 'function',
    'function': {'name': event.name, 'arguments': ''},
  }
  return {'tool_calls': [call]}
