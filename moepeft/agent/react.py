# SPDX-License-Identifier: Apache-2.0
"""ReAct: tool calls as text, for models without tool calls.

Requests with tools are converted to text, and text replies to messages with
calls. Yao et al., arXiv:2210.03629, with JSON as input of actions.
"""

import json
import re

from moepeft.agent.chat_model import Message, Request

_INSTRUCTIONS = """\
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
FORMAT_REMINDER = (
  'That was in neither form. Write "Action:" and "Action Input:" to use a '
  'tool, or "Final Answer:" and the answer.'
)
_OBSERVATION = 'Observation:'
_FINAL = re.compile(r'^\s*\**Final Answer:\**[ \t]*', re.M | re.I)
_ACTION = re.compile(
  r'^\s*\**Action:\**[ \t]*`?([\w-]+)`?[^\n]*\n+\s*\**Action Input:\**[ \t]*',
  re.M | re.I,
)


def to_text_request(request: Request) -> Request:
  """Converts a request with tools to one without."""
  messages = [_to_text_message(message) for message in request['messages']]
  tools = [item['function'] for item in request.get('tools', ())]
  other_fields = {
    key: value
    for key, value in request.items()
    if key not in ('tools', 'tool_choice', 'parallel_tool_calls')
  }
  if not tools:
    return {**other_fields, 'messages': messages}
  rules = _INSTRUCTIONS.format(
    names=', '.join(tool['name'] for tool in tools),
    tools='\n'.join(
      f'- {tool["name"]}: {tool["description"]} '
      f'{json.dumps(tool["parameters"])}'
      for tool in tools
    ),
  )
  if messages and messages[0]['role'] == 'system':
    rules = f'{messages.pop(0)["content"]}\n\n{rules}'
  # Stops before the model invents the output of a tool.
  messages.insert(0, {'role': 'system', 'content': rules})
  return {**other_fields, 'messages': messages, 'stop': [_OBSERVATION]}


def _to_text_message(message: Message) -> Message:
  if message['role'] == 'tool':
    return {'role': 'user', 'content': f'{_OBSERVATION}\n{message["content"]}'}
  return {key: message[key] for key in ('role', 'content')}


def parse_reply(message: Message, number: int) -> tuple[Message, str, str]:
  """Parses reply `number` of a question: (message, answer, format error)."""
  text = message['content'].partition(_OBSERVATION)[0].rstrip()
  message = {'role': 'assistant', 'content': text}
  final, action = _FINAL.search(text), _ACTION.search(text)
  if final and not (action and action.start() < final.start()):
    return message, text[final.end() :].strip(), ''
  if not action:
    return message, text, FORMAT_REMINDER
  function = {
    'name': action[1],
    'arguments': _first_object(text[action.end() :]),
  }
  call = {'id': f'react_{number}', 'type': 'function', 'function': function}
  return {**message, 'tool_calls': [call]}, '', ''


def _first_object(text: str) -> str:
  """The JSON object at the start of a text, or else the text."""
  text = re.sub(r'^```\w*\s*', '', text.strip())
  try:
    return text[: json.JSONDecoder().raw_decode(text)[1]]
  except (ValueError, RecursionError):
    return text
