# SPDX-License-Identifier: Apache-2.0
"""Renders conversations with a chat template and locates their answers."""

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
# Names of an answer's thoughts in templates.
_THOUGHT_KEYS = ('reasoning_content', 'thinking')


@dataclasses.dataclass(frozen=True)
class RenderedChat:
  """A conversation's text.

  Attributes:
    text: the output of the template.
    spans: character range [start, end) of each trained answer, in order and
      disjoint; None if the whole text is trained.
  """

  text: str
  spans: tuple[tuple[int, int], ...] | None


def render_chat(
  conversation: Conversation, tokenizer: Any, train_on: str, template: str
) -> RenderedChat:
  """Renders a conversation.

  Args:
    tokenizer: a Hugging Face tokenizer.
    train_on: 'answers' or 'all'.
    template: Jinja source; '' for the tokenizer's own template.

  Raises:
    BadRow: the template cannot render it, or rewrites turns so that answers
      cannot be found in its text exactly.
  """
  is_trained = [
    turn.trained for turn in conversation.turns if turn.role == 'assistant'
  ]
  if train_on == 'all' and not all(is_trained):
    raise BadRow(
      "a turn has 'weight' 0, but config.data.train_on='all' trains every "
      "turn; set it to 'answers', or remove the weight"
    )
  source = template_source(tokenizer, template)
  messages, tools = template_messages(conversation, source)
  render = make_renderer(tokenizer, template, tools)
  text = render(messages, False)
  if train_on == 'all':
    return RenderedChat(text, None)
  if answer_spans.has_generation_tags(source):
    source = tokenizer.get_chat_template(template or None, tools=tools)
    marked_template = answer_spans.mark_answers(source)
    render_marked = make_renderer(tokenizer, marked_template, tools)
    spans = answer_spans.marked_spans(render_marked(messages, False), text)
    if all(is_trained):
      is_trained = [True] * len(spans)
  else:
    spans = answer_spans.find_answers(render, messages, text)
  if len(spans) != len(is_trained):
    raise BadRow(
      f'the chat template marks {len(spans)} answers of {len(is_trained)}, so '
      "that their 'weight' cannot be told apart; name another template with "
      'config.data.chat_template'
    )
  pairs = zip(spans, is_trained, strict=True)
  return RenderedChat(text, tuple(span for span, trained in pairs if trained))


def render_prompt(
  conversation: Conversation, tokenizer: Any, template: str
) -> str:
  """A conversation's text up to and including the generation prompt.

  Raises:
    BadRow: the template cannot render it.
  """
  messages, tools = template_messages(
    conversation, template_source(tokenizer, template)
  )
  return make_renderer(tokenizer, template, tools)(messages, True)


def template_source(tokenizer: Any, template: str) -> str:
  """The Jinja source; several templates of a tokenizer are joined."""
  source = template or tokenizer.chat_template
  return source if isinstance(source, str) else '\n'.join(source.values())


def template_messages(
  conversation: Conversation, template: str
) -> tuple[list[dict], Any]:
  """(messages, tools) for a template.

  Calls and tools are written into the messages as JSON if the template does not
  render them.

  Raises:
    BadRow: there are thoughts, and the template does not render them.
  """
  turns, tools = list(conversation.turns), conversation.tools
  if tools and 'tools' not in template:
    tool_text = _TOOLS + '\n'.join(_json(t['function']) for t in tools)
    tools = None
    if turns[0].role == 'system':
      tool_text = f'{turns.pop(0).content}\n\n{tool_text}'
    turns.insert(0, Turn('system', tool_text))
  return [_message(turn, template) for turn in turns], tools


def _json(value: Any) -> str:
  """JSON as of the templates' filter `tojson`, without ASCII escapes."""
  return json.dumps(value, ensure_ascii=False)


def _message(turn: Turn, template: str) -> dict:
  message = {'role': turn.role, 'content': turn.content}
  if turn.thought:
    # Not within 'enable_thinking'.
    names = (
      name for name in _THOUGHT_KEYS if re.search(rf'(?<!\w){name}\b', template)
    )
    name = next(names, None)
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
      | {'type': 'function', 'function': _without_id(call)}
      for call in turn.calls
    ]
  elif turn.calls:
    calls = (
      f'<tool_call>{_json(_without_id(c))}</tool_call>' for c in turn.calls
    )
    message['content'] = '\n'.join([turn.content, *calls]).lstrip('\n')
  return message


def _without_id(call: dict) -> dict:
  return {k: v for k, v in call.items() if k != 'id'}


def make_renderer(tokenizer: Any, template: str, tools: Any) -> Render:
  """Makes a function that renders messages; errors become `BadRow`."""

  def render(messages: Sequence[dict], add_generation_prompt: bool) -> str:
    try:
      return tokenizer.apply_chat_template(
        list(messages),
        tools=tools,
        chat_template=template or None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
      )
    # A template is a program, which may raise any exception.
    except Exception as e:
      reason = ' '.join(str(e).split()) or type(e).__name__
      raise BadRow(
        f'the chat template cannot render the conversation ({reason}); mend '
        'its turns or the template'
      ) from None

  return render
