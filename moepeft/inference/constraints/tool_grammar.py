# SPDX-License-Identifier: Apache-2.0
"""Grammars that constrain an answer's tool calls."""

from collections.abc import Sequence

from moepeft.inference.constraints import lark
from moepeft.inference.tools.tools import CallFormat, ToolChoice, ToolSpec


def build_grammar(
  tools: Sequence[ToolSpec],
  choice: ToolChoice,
  parallel: bool,
  call_format: CallFormat,
) -> str:
  """Builds a grammar in llguidance's dialect of Lark.

  If `choice.mode` is 'required', the answer is one or more tool calls. If it is
  'auto', the answer may contain text too, in one of two ways. In a format with
  an opening marker, text may precede and follow calls, and each marker starts a
  call. In a format without one, an answer that starts with a brace is calls
  only, and any other answer is text only.

  Args:
    parallel: whether there may be several calls.

  Raises:
    ValueError: no tool may be called, or the JSON schema of a tool's parameters
      cannot be enforced.
  """
  allowed = [tool for tool in tools if tool.name in choice.names]
  if choice.mode == 'none' or not allowed:
    raise ValueError(
      "no tool may be called, so there is nothing to constrain; give 'tools' "
      "and another 'tool_choice'"
    )
  rules = [
    _start_rule(choice.mode == 'auto', parallel, call_format),
    _call_rule(allowed, call_format),
  ]
  rules += [_arguments_rule(i, tool) for i, tool in enumerate(allowed)]
  return '\n'.join(rules)


def _start_rule(
  allow_text: bool, parallel: bool, call_format: CallFormat
) -> str:
  separator = lark.literal(call_format.separator)
  opening = lark.literal(call_format.opening)
  if call_format.opening and allow_text:
    # Lazy, so that `opened` ends at the first marker, and a call must follow.
    rules = ['opened[lazy]: TEXT ' + opening, 'rest: TEXT', r'TEXT: /(.|\n)*/']
    calls = '(opened call)* rest' if parallel else 'opened call | rest'
    return '\n'.join([f'start: {calls}', *rules])
  marked_call = f'{opening} call' if call_format.opening else 'call'
  calls = (
    f'{marked_call} ({separator} {marked_call})*' if parallel else marked_call
  )
  if not allow_text:
    return f'start: {calls}'
  return f'start: {calls} | ANSWER?\n' + r'ANSWER: /\s*[^{\s](.|\n)*/'


def _call_rule(tools: Sequence[ToolSpec], call_format: CallFormat) -> str:
  """The rule for one call, from its opening to its closing marker."""
  prefixes = (
    lark.literal(f'{{"name": "{tool.name}", "{call_format.arguments_key}": ')
    for tool in tools
  )
  alternatives = ' | '.join(
    f'{prefix} arguments_{i}' for i, prefix in enumerate(prefixes)
  )
  if not call_format.closing:
    return f'call: ({alternatives}) "}}"'
  closing = lark.literal(call_format.closing)
  return f'call: NL? ({alternatives}) "}}" NL? {closing}\n' + r'NL: "\n"'


def _arguments_rule(i: int, tool: ToolSpec) -> str:
  try:
    return f'arguments_{i}: {lark.json_rule(tool.parameters, tool.strict)}'
  except ValueError as e:
    raise ValueError(
      f'the JSON schema of the tool {tool.name!r} cannot be enforced: {e}'
    ) from None
