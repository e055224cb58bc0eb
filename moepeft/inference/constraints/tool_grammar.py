# SPDX-License-Identifier: Apache-2.0
"""Grammars that constrain an answer's tool calls."""

from collections.abc import Sequence

from moepeft.inference.constraints import lark
from moepeft.inference.tools.tools import Choice, Style, ToolSpec


def build_grammar(
  tools: Sequence[ToolSpec], choice: Choice, parallel: bool, style: Style
) -> str:
  """Builds a grammar in llguidance's dialect of Lark.

  With mode 'required' the answer consists of tool calls only. With mode 'auto'
  the answer may start with any text, and only its calls are constrained. If the
  style has an opening marker, the marker starts a call, and text may follow the
  call. Otherwise an answer is either calls only, if its first character is a
  brace, or text without calls.

  Args:
    parallel: whether there may be several calls.

  Raises:
    ValueError: no tool may be called, or the schema of a tool's parameters
      cannot be enforced.
  """
  allowed = [tool for tool in tools if tool.name in choice.names]
  if choice.mode == 'none' or not allowed:
    raise ValueError(
      "no tool may be called, so there is nothing to constrain; give 'tools' "
      "and another 'tool_choice'"
    )
  rules = [
    _start_rule(choice.mode == 'auto', parallel, style),
    _call_rule(allowed, style),
  ]
  rules += [_arguments_rule(i, tool) for i, tool in enumerate(allowed)]
  return '\n'.join(rules)


def _start_rule(allow_text: bool, parallel: bool, style: Style) -> str:
  separator = lark.literal(style.separator)
  opening = lark.literal(style.opening)
  if style.opening and allow_text:
    # A lazy rule matches the shortest text that ends with the opening marker,
    # so that a call always follows the first marker.
    rules = ['head[lazy]: TEXT ' + opening, 'tail: TEXT', r'TEXT: /(.|\n)*/']
    calls = '(head call)* tail' if parallel else 'head call | tail'
    return '\n'.join([f'start: {calls}', *rules])
  single = f'{opening} call' if style.opening else 'call'
  calls = f'{single} ({separator} {single})*' if parallel else single
  if not allow_text:
    return f'start: {calls}'
  return f'start: {calls} | FREE?\n' + r'FREE: /\s*[^{\s](.|\n)*/'


def _call_rule(tools: Sequence[ToolSpec], style: Style) -> str:
  """The rule for one call, from its opening to its closing marker."""
  prefixes = (
    lark.literal(f'{{"name": "{tool.name}", "{style.key}": ') for tool in tools
  )
  alternatives = ' | '.join(
    f'{prefix} arguments_{i}' for i, prefix in enumerate(prefixes)
  )
  if not style.closing:
    return f'call: ({alternatives}) "}}"'
  closing = lark.literal(style.closing)
  return f'call: LINE? ({alternatives}) "}}" LINE? {closing}\n' + r'LINE: "\n"'


def _arguments_rule(i: int, tool: ToolSpec) -> str:
  try:
    return f'arguments_{i}: {lark.json_rule(tool.parameters, tool.strict)}'
  except ValueError as e:
    raise ValueError(
      f'the parameters of the tool {tool.name!r} cannot be enforced: {e}'
    ) from None
