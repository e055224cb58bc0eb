# SPDX-License-Identifier: Apache-2.0
"""Conversations as the text of a chat template, and where answers stand."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from moepeft.data.chat import answer_spans
from moepeft.data.chat.answer_spans import Render
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow

_TOOLS = (
  'You may call these tools, each a JSON schema. To call one, answer with '
  '<tool_call>{"name": ..., "arguments": ...}</tool_call>.\n'
)
# By what templates name an answer's thoughts.
_THOUGHTS = ('reasoning_content', 'thinking')


@dataclasses.dataclass(frozen=True)
class RenderedChat:
  """A conversation's text.

  Attributes:
    whole: as the template writes it.
    spans: [start, end) of each answer that is trained, in order and apart;
      None where all is trained.
  """

  whole: str
  spans: tuple[tuple[int, int], ...] | None


def render_chat(
  found: Conversation, tokenizer: Any, train_on: str, template: str
) -> RenderedChat:
  """Renders a conversation.

  Args:
    tokenizer: of Hugging Face.
    train_on: 'answers', or 'all'.
    template: Jinja; '' for the tokenizer's own.

  Raises:
    BadRow: the template cannot render it, or rewrites turns so that answers
      cannot be found in its text exactly.
  """
  kept = [turn.trained for turn in found.turns if turn.role == 'assistant']
  if train_on == 'all' and not all(kept):
    raise BadRow(
      "a turn has 'weight' 0, but config.data.train_on='all' trains every "
      "turn; set it to 'answers', or remove the weight"
    )
  used = template_source(tokenizer, template)
  some, tools = template_messages(found, used)
  render = make_renderer(tokenizer, template, tools)
  whole = render(some, False)
  if train_on == 'all':
    return RenderedChat(whole, None)
  if answer_spans.has_generation_marks(used):
    own = tokenizer.get_chat_template(template or None, tools=tools)
    marked = make_renderer(tokenizer, answer_spans.show_marks(own), tools)(
      some, False
    )
    found = answer_spans.marked_spans(marked, whole)
    if all(kept):
      kept = [True] * len(found)
  else:
    found = answer_spans.find_answers(render, some, whole)
  if len(found) != len(kept):
    raise BadRow(
      f'the chat template marks {len(found)} answers of {len(kept)}, so that '
      "their 'weight' cannot be told apart; name another template with "
      'config.data.chat_template'
    )
  pairs = zip(found, kept, strict=True)
  return RenderedChat(whole, tuple(span for span, own in pairs if own))


def render_prompt(found: Conversation, tokenizer: Any, template: str) -> str:
  """A conversation up to where the assistant speaks.

  Raises:
    BadRow: the template cannot render it.
  """
  some, tools = template_messages(found, template_source(tokenizer, template))
  return make_renderer(tokenizer, template, tools)(some, True)


def template_source(tokenizer: Any, template: str) -> str:
  """All that the template may say, for what it knows of."""
  own = template or tokenizer.chat_template
  return own if isinstance(own, str) else '\n'.join(own.values())


def template_messages(
  found: Conversation, template: str
) -> tuple[list[dict], Any]:
  """(turns as the template reads them, tools).

  Where it has no words for calls or tools, they are written into the turns as
  JSON.

  Raises:
    BadRow: there are thoughts, and it has no words for them.
  """
  turns, tools = list(found.turns), found.tools
  if tools and 'tools' not in template:
    said = _TOOLS + '\n'.join(_json(t['function']) for t in tools)
    tools = None
    if turns[0].role == 'system':
      said = f'{turns.pop(0).content}\n\n{said}'
    turns.insert(0, Turn('system', said))
  return [_message(turn, template) for turn in turns], tools


def _json(value: Any) -> str:
  """As templates' `tojson` writes it: letters as they are."""
  return json.dumps(value, ensure_ascii=False)


def _message(turn: Turn, template: str) -> dict:
  message = {'role': turn.role, 'content': turn.content}
  if turn.thought:
    # 'enable_thinking' is another thing.
    known = (
      name for name in _THOUGHTS if re.search(rf'(?<!\w){name}\b', template)
    )
    name = next(known, None)
    if name is None:
      raise BadRow(
        "a turn has 'reasoning_content', which the chat template does not "
        'write; name one that does with config.data.chat_template, or write '
        "the thoughts into 'content'"
      )
    message[name] = turn.thought
  if turn.name:
    message['name'] = turn.name
  if turn.call_id:
    message['tool_call_id'] = turn.call_id
  if turn.calls and 'tool_calls' in template:
    message['tool_calls'] = [
      {k: v for k, v in call.items() if k == 'id'}
      | {'type': 'function', 'function': _bare(call)}
      for call in turn.calls
    ]
  elif turn.calls:
    calls = (f'<tool_call>{_json(_bare(c))}</tool_call>' for c in turn.calls)
    message['content'] = '\n'.join([turn.content, *calls]).lstrip('\n')
  return message


def _bare(call: dict) -> dict:
  """A call without its id."""
  return {k: v for k, v in call.items() if k != 'id'}


def make_renderer(tokenizer: Any, template: str, tools: Any) -> Render:
  """Texts of messages by a template, whose failure is a bad row."""

  def render(some: Sequence[dict], begun: bool) -> str:
    try:
      return tokenizer.apply_chat_template(
        list(some),
        tools=tools,
        chat_template=template or None,
        tokenize=False,
        add_generation_prompt=begun,
      )
    # A template is a program: there is no list of what it may raise.
    except Exception as e:
      reason = ' '.join(str(e).split()) or type(e).__name__
      raise BadRow(
        f'the chat template cannot render the conversation ({reason}); mend '
        'its turns or the template'
      ) from None

  return render
