# SPDX-License-Identifier: Apache-2.0
"""An assistant's message, put together of a stream's deltas."""

from collections.abc import Sequence
from typing import Any


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
