# SPDX-License-Identifier: Apache-2.0
"""Tools as OpenAI's API has them, and how models write calls of them.

A model was taught one form of calls; it is found in its chat template. Hermes'
and Qwen's is `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, also
what `moepeft.data` writes where a template has no words for tools; Llama 3's
is JSON with `parameters`; else it is JSON with `arguments`. `tools.parser`
parses calls, `constraints.tool_grammar` constrains an answer to them.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from moepeft.data.chat.formats import Conversation
from moepeft.data.chat.messages import Turn
from moepeft.inference import json_schema

MOST = 128
_NAME = re.compile('[a-zA-Z0-9_-]{1,64}')
_MODES = ('none', 'auto', 'required')
_EMPTY = {'type': 'object', 'properties': {}}


@dataclasses.dataclass(frozen=True)
class Style:
  """A form of calls.

  Attributes:
    name: one of STYLES.
    opening, closing: markers around a call; '' for no marker.
    key: the JSON key of its arguments.
    separator: text between two calls.
  """

  name: str
  opening: str
  closing: str
  key: str
  separator: str


STYLES = {
  style.name: style
  for style in (
    Style('hermes', '<tool_call>', '</tool_call>', 'arguments', '\n'),
    Style('llama', '', '', 'parameters', '; '),
    Style('json', '', '', 'arguments', '\n'),
  )
}


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """A function that may be called.

  Attributes:
    name, description: as the model reads them.
    parameters: a JSON schema of an object.
    strict: whether the schema is kept whole; else what cannot be is left out.
  """

  name: str
  description: str = ''
  parameters: Any = dataclasses.field(default_factory=lambda: dict(_EMPTY))
  strict: bool = False

  def to_openai(self) -> dict:
    """In OpenAI's form, as templates read it."""
    function = {'name': self.name}
    if self.description:
      function['description'] = self.description
    return {
      'type': 'function',
      'function': function | {'parameters': self.parameters},
    }


@dataclasses.dataclass(frozen=True)
class Choice:
  """The tools that may be called, and whether one must.

  Attributes:
    mode: 'none', 'auto' or 'required'.
    names: of those that may.
    once: whether there is one call exactly, as of a tool that is named.
  """

  mode: str
  names: tuple[str, ...]
  once: bool = False


def check(items: Any) -> tuple[ToolSpec, ...]:
  """The tools of a request.

  Args:
    items: [{'type': 'function', 'function': {'name', 'description',
      'parameters', 'strict'}}].

  Raises:
    ValueError: what is wrong with them, a sentence.
  """
  if not isinstance(items, list | tuple) or not items:
    raise ValueError("'tools' is a list of at least one tool; leave it out")
  if len(items) > MOST:
    raise ValueError(
      f"'tools' has {len(items)} tools, expected at most {MOST}; leave some out"
    )
  tools = tuple(_tool(item, f'tools[{i}]') for i, item in enumerate(items))
  size = sum(len(json_schema.written(tool.parameters)) for tool in tools)
  if size > json_schema.CHARACTERS:
    raise ValueError(
      f"the parameters of 'tools' have {size:,} characters, expected at most "
      f'{json_schema.CHARACTERS:,}; make them smaller'
    )
  names = [tool.name for tool in tools]
  twice = next((name for name in names if names.count(name) > 1), None)
  if twice is not None:
    raise ValueError(f"'tools' has {twice!r} twice; give each its own name")
  return tools


def _tool(item: Any, label: str) -> ToolSpec:
  function = item.get('function') if isinstance(item, dict) else None
  if not isinstance(function, dict) or item.get('type') != 'function':
    raise ValueError(
      f"{label} is no function; expected {{'type': 'function', 'function': "
      "{'name': ...}}"
    )
  name = function.get('name')
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ValueError(
      f'{label} has the name {name!r}; expected 1 to 64 letters, digits, _ or -'
    )
  label = f'the tool {name!r}'
  description, strict = function.get('description'), function.get('strict')
  if description is not None and not isinstance(description, str):
    raise ValueError(f"{label} has a 'description' that is no text; mend it")
  if strict is not None and not isinstance(strict, bool):
    raise ValueError(f"{label} has 'strict' {strict!r}; expected true or false")
  parameters = _parameters(function.get('parameters'), label)
  return ToolSpec(name, description or '', parameters, bool(strict))


def _parameters(value: Any, label: str) -> dict:
  if value is None or value == {}:
    return dict(_EMPTY)
  if not isinstance(value, dict) or value.get('type') != 'object':
    raise ValueError(
      f"{label} has 'parameters' that are no object; expected a JSON schema "
      "with 'type': 'object'"
    )
  try:
    # What is not strict may be given to the model and never compiled.
    json_schema.prepared(value, False)
  except ValueError as e:
    raise ValueError(f"{label} has wrong 'parameters': {e}") from None
  return value


def read_tool_choice(tool_choice: Any, tools: Sequence[ToolSpec]) -> Choice:
  """The choice that a request's 'tool_choice' names.

  Args:
    tool_choice: 'none', 'auto', 'required', a named function, a list of allowed
      ones, or None, which is 'auto' where there are tools.

  Raises:
    ValueError: it is none of them, or names what is no tool.
  """
  names = tuple(tool.name for tool in tools)
  if tool_choice is None:
    return Choice('auto' if tools else 'none', names)
  if isinstance(tool_choice, str) and tool_choice in _MODES:
    if tool_choice == 'required' and not tools:
      raise ValueError("'tool_choice' is 'required', but there are no 'tools'")
    return Choice(tool_choice, names)
  kind = tool_choice.get('type') if isinstance(tool_choice, dict) else None
  if kind == 'function':
    return Choice('required', (_named(tool_choice, names),), once=True)
  if kind == 'allowed_tools':
    # The API has both a flat form and one inside of its own key.
    allowed = tool_choice.get('allowed_tools', tool_choice)
    mode = allowed.get('mode') if isinstance(allowed, dict) else None
    listed = allowed.get('tools') if isinstance(allowed, dict) else None
    if mode in _MODES[1:] and isinstance(listed, list) and listed:
      return Choice(mode, tuple(_named(entry, names) for entry in listed))
  raise ValueError(
    f"'tool_choice' is one of {', '.join(_MODES)} or {{'type': 'function', "
    f"'function': {{'name': ...}}}}, got {tool_choice!r}"
  )


def _named(item: Any, names: Sequence[str]) -> str:
  item = item if isinstance(item, dict) else {}
  function = item.get('function', item)
  name = function.get('name') if isinstance(function, dict) else None
  if name not in names:
    raise ValueError(
      f"'tool_choice' names {name!r}, which is no tool; expected one of "
      f'{", ".join(names)}'
    )
  return name


def style_of(template: str) -> Style:
  """The form in which a chat template's model writes calls.

  Args:
    template: Jinja; '' and those that have no words for tools are Hermes',
      which `moepeft.data` tells such models of.

  Raises:
    ValueError: the template writes them in a form that is not known here.
  """
  if '<function=' in template or '<|tool_call>' in template:
    raise ValueError(
      'the chat template writes calls of tools in a form that is not supported '
      f'here; name one of {", ".join(STYLES)}, or another template'
    )
  if '<tool_call>' in template or 'tools' not in template:
    return STYLES['hermes']
  if '"parameters":' in template or '<|python_tag|>' in template:
    return STYLES['llama']
  return STYLES['json']


def with_tools(
  conversation: Conversation,
  tools: Sequence[ToolSpec],
  choice: Choice,
  style: Style,
  template: str,
) -> Conversation:
  """A conversation whose prompt has the tools that may be called.

  They are the template's to write, or, in Hermes' form, `chat_text`'s; where
  the template has no words for them and the style is another, they are in the
  system's turn.
  """
  allowed = [tool for tool in tools if tool.name in choice.names]
  if choice.mode == 'none' or not allowed:
    return dataclasses.replace(conversation, tools=None)
  if 'tools' in template or style.name == 'hermes':
    return dataclasses.replace(
      conversation, tools=[tool.to_openai() for tool in allowed]
    )
  system, turns = instructions(allowed, style), list(conversation.turns)
  if turns and turns[0].role == 'system':
    system = f'{turns.pop(0).content}\n\n{system}'
  return Conversation((Turn('system', system), *turns))


def instructions(tools: Sequence[ToolSpec], style: Style) -> str:
  """The instructions for a model that was never taught calls."""
  call = f'{{"name": ..., "{style.key}": ...}}'
  functions = [
    json.dumps(tool.to_openai()['function'], ensure_ascii=False)
    for tool in tools
  ]
  return '\n'.join(
    [
      'You may call these tools, each a JSON schema. To call one, answer with '
      f'{style.opening}{call}{style.closing} and nothing else.',
      *functions,
    ]
  )
