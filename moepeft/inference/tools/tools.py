# SPDX-License-Identifier: Apache-2.0
"""OpenAI's tools, and the formats in which models write tool calls.

The chat template shows a model's format. That of Hermes and Qwen is
`<tool_call>{"name": ..., "arguments": ...}</tool_call>`; `moepeft.data` uses it
too if a template does not support tools. Llama 3's is JSON with the key
`parameters`, and the last is JSON with the key `arguments`. `tools.parser`
parses calls, and `constraints.tool_grammar` constrains an answer to them.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from moepeft.data.chat.formats import Conversation
from moepeft.data.chat.messages import Turn
from moepeft.inference import json_schema

MAX_TOOLS = 128
_NAME = re.compile('[a-zA-Z0-9_-]{1,64}')
_MODES = ('none', 'auto', 'required')
_NO_PARAMETERS = {'type': 'object', 'properties': {}}


@dataclasses.dataclass(frozen=True)
class CallFormat:
  """A format in which a model writes tool calls.

  Attributes:
    name: a key of CALL_FORMATS.
    opening, closing: markers around a call; '' for no marker.
    arguments_key: the JSON key of the arguments.
    separator: the text between two calls.
  """

  name: str
  opening: str
  closing: str
  arguments_key: str
  separator: str


CALL_FORMATS = {
  call_format.name: call_format
  for call_format in (
    CallFormat('hermes', '<tool_call>', '</tool_call>', 'arguments', '\n'),
    CallFormat('llama', '', '', 'parameters', '; '),
    CallFormat('json', '', '', 'arguments', '\n'),
  )
}


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """A function that the model may call.

  Attributes:
    name, description: the texts that the model reads.
    parameters: the JSON schema of the arguments, an object.
    strict: whether unsupported keywords of the schema are errors; otherwise
      they are ignored.
  """

  name: str
  description: str = ''
  parameters: Any = dataclasses.field(
    default_factory=lambda: dict(_NO_PARAMETERS)
  )
  strict: bool = False

  def to_openai(self) -> dict:
    """Returns OpenAI's JSON object, which chat templates read."""
    function = {'name': self.name}
    if self.description:
      function['description'] = self.description
    return {
      'type': 'function',
      'function': function | {'parameters': self.parameters},
    }


@dataclasses.dataclass(frozen=True)
class ToolChoice:
  """The tools that may be called, and whether one must.

  Attributes:
    mode: 'none', 'auto' or 'required'.
    names: the names of the tools that may be called.
    once: whether there must be exactly one call, because tool_choice names the
      tool.
  """

  mode: str
  names: tuple[str, ...]
  once: bool = False


def check_tools(items: Any) -> tuple[ToolSpec, ...]:
  """Checks the tools of a request.

  Args:
    items: [{'type': 'function', 'function': {'name', 'description',
      'parameters', 'strict'}}].

  Raises:
    ValueError: a tool is invalid.
  """
  if not isinstance(items, list | tuple) or not items:
    raise ValueError("'tools' is not a list of at least one tool; leave it out")
  if len(items) > MAX_TOOLS:
    raise ValueError(
      f"'tools' has {len(items)} tools, expected at most {MAX_TOOLS}; leave "
      'some out'
    )
  tools = tuple(
    _check_tool(item, f'tools[{i}]') for i, item in enumerate(items)
  )
  size = sum(len(json_schema.to_json(tool.parameters)) for tool in tools)
  if size > json_schema.MAX_CHARACTERS:
    raise ValueError(
      f"the parameters of 'tools' have {size:,} characters, expected at most "
      f'{json_schema.MAX_CHARACTERS:,}; make them smaller'
    )
  names = [tool.name for tool in tools]
  repeated = next((name for name in names if names.count(name) > 1), None)
  if repeated is not None:
    raise ValueError(f"'tools' has {repeated!r} twice; give each its own name")
  return tools


def _check_tool(item: Any, label: str) -> ToolSpec:
  function = item.get('function') if isinstance(item, dict) else None
  if not isinstance(function, dict) or item.get('type') != 'function':
    raise ValueError(
      f"{label} is not a function; expected {{'type': 'function', 'function': "
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
    raise ValueError(f"{label} has a 'description' that is not a text")
  if strict is not None and not isinstance(strict, bool):
    raise ValueError(f"{label} has 'strict' {strict!r}; expected true or false")
  parameters = _check_parameters(function.get('parameters'), label)
  return ToolSpec(name, description or '', parameters, bool(strict))


def _check_parameters(value: Any, label: str) -> dict:
  if value is None or value == {}:
    return dict(_NO_PARAMETERS)
  if not isinstance(value, dict) or value.get('type') != 'object':
    raise ValueError(
      f"{label} has 'parameters' that are no object; expected a JSON schema "
      "with 'type': 'object'"
    )
  try:
    # Lenient, because without a constraint the schema is never compiled.
    json_schema.prepare(value, False)
  except ValueError as e:
    raise ValueError(f"{label} has invalid 'parameters': {e}") from None
  return value


def read_tool_choice(tool_choice: Any, tools: Sequence[ToolSpec]) -> ToolChoice:
  """Reads a request's 'tool_choice'.

  Args:
    tool_choice: 'none', 'auto', 'required', a function, a list of allowed
      tools, or None, which is 'auto' if there are tools.

  Raises:
    ValueError: it is invalid, or names an unknown tool.
  """
  names = tuple(tool.name for tool in tools)
  if tool_choice is None:
    return ToolChoice('auto' if tools else 'none', names)
  if isinstance(tool_choice, str) and tool_choice in _MODES:
    if tool_choice == 'required' and not tools:
      raise ValueError("'tool_choice' is 'required', but there are no 'tools'")
    return ToolChoice(tool_choice, names)
  kind = tool_choice.get('type') if isinstance(tool_choice, dict) else None
  if kind == 'function':
    return ToolChoice('required', (_tool_name(tool_choice, names),), once=True)
  if kind == 'allowed_tools':
    # The API has a flat format, and one nested below its own key.
    allowed = tool_choice.get('allowed_tools', tool_choice)
    mode = allowed.get('mode') if isinstance(allowed, dict) else None
    entries = allowed.get('tools') if isinstance(allowed, dict) else None
    if mode in _MODES[1:] and isinstance(entries, list) and entries:
      return ToolChoice(
        mode, tuple(_tool_name(entry, names) for entry in entries)
      )
  raise ValueError(
    f"'tool_choice' is one of {', '.join(_MODES)} or {{'type': 'function', "
    f"'function': {{'name': ...}}}}, got {tool_choice!r}"
  )


def _tool_name(item: Any, names: Sequence[str]) -> str:
  item = item if isinstance(item, dict) else {}
  function = item.get('function', item)
  name = function.get('name') if isinstance(function, dict) else None
  if name not in names:
    raise ValueError(
      f"'tool_choice' names {name!r}, which is not a tool; expected one of "
      f'{", ".join(names)}'
    )
  return name


def find_call_format(template: str) -> CallFormat:
  """Finds the format of tool calls in a chat template.

  Args:
    template: the Jinja source. For one without support for tools, the format is
      Hermes', which `moepeft.data` uses then.

  Raises:
    ValueError: the template has an unknown format.
  """
  if '<function=' in template or '<|tool_call>' in template:
    raise ValueError(
      'the chat template writes tool calls in a format that is not supported; '
      f'use a template with one of {", ".join(CALL_FORMATS)}'
    )
  if '<tool_call>' in template or 'tools' not in template:
    return CALL_FORMATS['hermes']
  if '"parameters":' in template or '<|python_tag|>' in template:
    return CALL_FORMATS['llama']
  return CALL_FORMATS['json']


def with_tools(
  conversation: Conversation,
  tools: Sequence[ToolSpec],
  choice: ToolChoice,
  call_format: CallFormat,
  template: str,
) -> Conversation:
  """Adds the tools that may be called to a conversation.

  The chat template renders them, or `moepeft.data.chat` in the Hermes format.
  If the template does not support tools, they are added to the system turn.
  """
  allowed = [tool for tool in tools if tool.name in choice.names]
  if choice.mode == 'none' or not allowed:
    return dataclasses.replace(conversation, tools=None)
  if 'tools' in template or call_format.name == 'hermes':
    return dataclasses.replace(
      conversation, tools=[tool.to_openai() for tool in allowed]
    )
  system, turns = instructions(allowed, call_format), list(conversation.turns)
  if turns and turns[0].role == 'system':
    system = f'{turns.pop(0).content}\n\n{system}'
  return Conversation((Turn('system', system), *turns))


def instructions(tools: Sequence[ToolSpec], call_format: CallFormat) -> str:
  """The instructions for a model whose chat template does not support tools."""
  call = f'{{"name": ..., "{call_format.arguments_key}": ...}}'
  functions = [
    json.dumps(tool.to_openai()['function'], ensure_ascii=False)
    for tool in tools
  ]
  return '\n'.join(
    [
      'You may call these tools, each a JSON schema. To call one, answer with '
      f'{call_format.opening}{call}{call_format.closing} and nothing else.',
      *functions,
    ]
  )
