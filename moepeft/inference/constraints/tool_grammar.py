# SPDX-License-Identifier: Apache-2.0
"""Calls of tools as a grammar: always, or from where one begins."""

from collections.abc import Sequence

from moepeft.inference.constraints import lark
from moepeft.inference.tools.tools import Choice, Style, ToolSpec


def text(
  tools: Sequence[ToolSpec], choice: Choice, parallel: bool, style: Style
) -> str:
  """The grammar, in llguidance's kind of Lark.

  With 'required' the answer is calls and nothing else. With 'auto' it is any
  text until a call begins, which is then kept to its form: at the opening
  where the style has one, with more text after it; else where the answer
  begins with a brace, and nothing follows but calls.

  Args:
    parallel: whether there may be several calls.

  Raises:
    ValueError: no tool may be called, or the parameters of one cannot be kept.
  """
  allowed = [tool for tool in tools if tool.name in choice.names]
  if choice.mode == 'none' or not allowed:
    raise ValueError(
      "no tool may be called, so there is nothing to constrain; give 'tools' "
      "and another 'tool_choice'"
    )
  rules = [
    _start(choice.mode == 'auto', parallel, style),
    _call(allowed, style),
  ]
  rules += [_arguments(i, tool) for i, tool in enumerate(allowed)]
  return '\n'.join(rules)


def _start(free: bool, parallel: bool, style: Style) -> str:
  between = lark.literal(style.between)
  opening = lark.literal(style.opening)
  if style.opening and free:
    # The shortest text that ends with the opening: what is after it is a call.
    rules = ['head[lazy]: TEXT ' + opening, 'tail: TEXT', r'TEXT: /(.|\n)*/']
    calls = '(head call)* tail' if parallel else 'head call | tail'
    return '\n'.join([f'start: {calls}', *rules])
  single = f'{opening} call' if style.opening else 'call'
  several = f'{single} ({between} {single})*' if parallel else single
  if not free:
    return f'start: {several}'
  return f'start: {several} | FREE?\n' + r'FREE: /\s*[^{\s](.|\n)*/'


def _call(tools: Sequence[ToolSpec], style: Style) -> str:
  """The rule of a call after its opening."""
  named = (
    lark.literal(f'{{"name": "{tool.name}", "{style.key}": ') for tool in tools
  )
  each = ' | '.join(f'{text} arguments_{i}' for i, text in enumerate(named))
  if not style.closing:
    return f'call: ({each}) "}}"'
  closing = lark.literal(style.closing)
  return f'call: LINE? ({each}) "}}" LINE? {closing}\n' + r'LINE: "\n"'


def _arguments(i: int, tool: ToolSpec) -> str:
  try:
    return f'arguments_{i}: {lark.json_of(tool.parameters, tool.strict)}'
  except ValueError as e:
    raise ValueError(f'the tool {tool.name!r} cannot be kept: {e}') from None
