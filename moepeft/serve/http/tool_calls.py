# SPDX-License-Identifier: Apache-2.0
"""Tool calls in chat: checks the tools, constrains and parses the calls."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moepeft.data.chat.formats import Conversation
from moepeft.inference.api import Constraint, EngineFull
from moepeft.inference.constraints.grammar import Compiler
from moepeft.inference.tools import parser as calls
from moepeft.inference.tools import tools
from moepeft.serve.http.errors import invalid_request, refusal_error
from moepeft.serve.http.requests import CheckedConstraint


class ContentReader:
  """Reads an answer without tools: all of the text is content."""

  has_call = False

  def feed(self, text: str) -> list[dict[str, Any]]:
    return [{'content': text}] if text else []

  def finish(self) -> list[dict[str, Any]]:
    return []


def assistant_message(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Makes OpenAI's message; its content is null if there are only calls."""
  text, calls = '', []
  for delta in deltas:
    text += delta.get('content', '')
    for part in delta.get('tool_calls', ()):
      if 'id' in part:
        function_dict = {'name': part['function']['name'], 'arguments': ''}
        calls.append(
          {'id': part['id'], 'type': 'function', 'function': function_dict}
        )
      function = calls[part['index']]['function']
      function['arguments'] += part['function']['arguments']
  message_dict = {'role': 'assistant', 'content': text, 'refusal': None}
  if calls:
    message_dict |= {'content': text or None, 'tool_calls': calls}
  return message_dict


class ToolPlanner:
  """Makes the tool plan of a request."""

  def __init__(self, compiler: Compiler | None):
    """
    Args:
      compiler: None if calls cannot be constrained.
    """
    self._compiler = compiler

  def plan(
    self, tool_list: list, choice: Any, parallel: bool, template: str
  ) -> 'ToolPlan | None':
    """Makes the tool plan of a request; None if tool_choice is 'none'.

    Args:
      tool_list, choice: OpenAI's `tools` and `tool_choice`.
      template: the source of the model's chat template.

    Raises:
      ApiError: a tool or the choice is invalid.
    """
    try:
      checked_tools = tools.check_tools(tool_list)
      tool_choice = tools.read_tool_choice(choice, checked_tools)
      if tool_choice.mode == 'none':
        return None
      call_format = tools.find_call_format(template)
    except ValueError as e:
      raise invalid_request(str(e), 'tools') from None
    if self._compiler is None and tool_choice.mode == 'required':
      raise invalid_request(
        "a tool's call is forced by llguidance, which is not installed here; "
        "run pip install 'moepeft[serve]', or set tool_choice to 'auto'",
        'tool_choice',
      )
    parallel_calls = parallel and not tool_choice.once
    return ToolPlan(
      checked_tools,
      tool_choice,
      call_format,
      parallel_calls,
      template,
      self._compiler,
    )


@dataclasses.dataclass(frozen=True)
class ToolPlan:
  """The tools that the answers to a request may call."""

  tools: tuple[tools.ToolSpec, ...]
  choice: tools.ToolChoice
  call_format: tools.CallFormat
  parallel: bool
  template: str
  compiler: Compiler | None

  @property
  def may_be_text(self) -> bool:
    """Whether the answer may be text without a call."""
    return self.choice.mode == 'auto'

  def with_tools(self, conversation: Conversation) -> Conversation:
    return tools.with_tools(
      conversation, self.tools, self.choice, self.call_format, self.template
    )

  def constraint(self) -> Constraint | None:
    if self.compiler is None:
      return None
    try:
      return CheckedConstraint(
        self.compiler.tools(
          self.tools, self.choice, self.parallel, self.call_format
        )
      )
    except EngineFull as e:
      raise refusal_error(e, 'tools') from None
    except ValueError as e:
      raise invalid_request(str(e), 'tools') from None

  def reader(self) -> 'ToolCallReader':
    return ToolCallReader(
      calls.ToolCallParser(
        self.call_format,
        self.choice.names,
        constrained=self.compiler is not None,
        calls_only=self.compiler is not None and not self.may_be_text,
      )
    )


class ToolCallReader:
  """Parses an answer's text into chat deltas while it is generated.

  Attributes:
    has_call: whether the answer calls a tool.
  """

  def __init__(self, parser: calls.ToolCallParser):
    self._parser, self.has_call = parser, False

  def feed(self, text: str) -> list[dict[str, Any]]:
    return self._deltas(self._parser.feed(text))

  def finish(self) -> list[dict[str, Any]]:
    return self._deltas(self._parser.finish())

  def _deltas(self, events: list[calls.Event]) -> list[dict[str, Any]]:
    self.has_call |= any(isinstance(event, calls.CallStart) for event in events)
    return [_delta(event) for event in events]


def _delta(event: calls.Event) -> dict[str, Any]:
  if isinstance(event, calls.ContentDelta):
    return {'content': event.text}
  if isinstance(event, calls.ArgumentsDelta):
    function = {'arguments': event.text}
    return {'tool_calls': [{'index': event.index, 'function': function}]}
  call = {
    'index': event.index,
    'id': event.id,
    'type': 'function',
    'function': {'name': event.name, 'arguments': ''},
  }
  return {'tool_calls': [call]}
