# SPDX-License-Identifier: Apache-2.0
"""Two ways of asking for tools: native calls, and ReAct's text.

ReAct: Yao et al., arXiv:2210.03629, with JSON as the actions' input.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moepeft.agent.calls import Result, as_data
from moepeft.agent.model import Call, Reply
from moepeft.agent.tools import Tool

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Said:
  """A reply, understood: calls, or an answer, or what is wrong with it.

  Attributes:
    calls: tools to run.
    text: the answer, where there are no calls.
    wrong: a sentence for the model where it broke the protocol.
    message: the reply as the conversation keeps it.
  """

  message: Message
  calls: tuple[Call, ...] = ()
  text: str = ''
  wrong: str = ''


class Form(Protocol):
  """How tools are told of, asked for and answered."""

  name: str

  def system(self, tools: Sequence[Tool]) -> str:
    """What the system prompt says of it; '' for nothing."""

  def request(self, tools: Sequence[Tool]) -> dict[str, Any]:
    """What a request has beside its messages."""

  def read(self, reply: Reply, number: int) -> Said:
    """Understands a reply, the conversation's `number`-th."""

  def results(self, results: Sequence[tuple[Result, str]]) -> list[Message]:
    """Messages for results, each with a note of ours ('' for none)."""


class Native:
  """Tool calls as the API has them."""

  name = 'native'

  def system(self, tools: Sequence[Tool]) -> str:
    return ''

  def request(self, tools: Sequence[Tool]) -> dict[str, Any]:
    return {'tools': [tool.declared() for tool in tools]} if tools else {}

  def read(self, reply: Reply, number: int) -> Said:
    message = {'role': 'assistant', 'content': reply.text}
    if not reply.calls:
      return Said(message, text=reply.text)
    calls = [
      {
        'id': call.id,
        'type': 'function',
        'function': {'name': call.name, 'arguments': call.arguments},
      }
      for call in reply.calls
    ]
    return Said({**message, 'tool_calls': calls}, reply.calls)

  def results(self, results: Sequence[tuple[Result, str]]) -> list[Message]:
    return [
      {
        'role': 'tool',
        'tool_call_id': result.call.id,
        'content': as_data(result) + note,
      }
      for result, note in results
    ]


_RULES = """\
You may use tools. Answer in exactly one of these two forms.

To use a tool:
Thought: why you need it
Action: the tool's name, one of {names}
Action Input: its arguments as a JSON object on one line

You are then shown a line Observation: with what it returned.

To answer the user:
Thought: why you are done
Final Answer: the answer

The tools, with the JSON schema of their arguments:
{tools}"""
_WRONG = (
  'That was in neither form. Write "Action:" and "Action Input:" to use a '
  'tool, or "Final Answer:" and the answer.'
)
_OBSERVATION = 'Observation:'
_FINAL = re.compile(r'^\s*\**Final Answer:\**[ \t]*', re.M | re.I)
_ACTION = re.compile(
  r'^\s*\**Action:\**[ \t]*`?([\w-]+)`?[^\n]*\n+\s*\**Action Input:\**[ \t]*',
  re.M | re.I,
)


class ReAct:
  """Thought, action, observation: for models without native calls."""

  name = 'react'

  def system(self, tools: Sequence[Tool]) -> str:
    listed = '\n'.join(
      f'- {tool.name}: {tool.description} {json.dumps(tool.schema)}'
      for tool in tools
    )
    names = ', '.join(tool.name for tool in tools) or '(there are none)'
    return _RULES.format(names=names, tools=listed)

  def request(self, tools: Sequence[Tool]) -> dict[str, Any]:
    # What a tool returns is for us to say.
    return {'stop': [_OBSERVATION]}

  def read(self, reply: Reply, number: int) -> Said:
    text = reply.text.partition(_OBSERVATION)[0].rstrip()
    message = {'role': 'assistant', 'content': text}
    final, action = _FINAL.search(text), _ACTION.search(text)
    if final and not (action and action.start() < final.start()):
      return Said(message, text=text[final.end() :].strip())
    if not action:
      return Said(message, text=text, wrong=_WRONG)
    arguments = _first_object(text[action.end() :])
    call = Call(f'react_{number}', action[1], arguments)
    return Said(message, (call,))

  def results(self, results: Sequence[tuple[Result, str]]) -> list[Message]:
    said = [
      f'{_OBSERVATION}\n{as_data(result)}{note}' for result, note in results
    ]
    return [{'role': 'user', 'content': '\n'.join(said)}]


def _first_object(text: str) -> str:
  """The JSON object that a text begins with; the text where there is none."""
  text = re.sub(r'^```\w*\s*', '', text.strip())
  try:
    _, end = json.JSONDecoder().raw_decode(text)
  except ValueError:
    return text
  return text[:end]


FORMS: dict[str, Form] = {form.name: form for form in (Native(), ReAct())}
