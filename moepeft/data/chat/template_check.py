# SPDX-License-Identifier: Apache-2.0
"""Checks which parts of a conversation a chat template leaves out.

It renders test conversations and searches the text for their parts.
"""

from collections.abc import Sequence
from typing import Any

from moepeft.data.chat import render as chat_render
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow

_QUESTION, _ANSWER, _RESULT = 'Question7', 'Answer7', 'Result7'
_CHAT = (Turn('user', _QUESTION), Turn('assistant', _ANSWER))
_CALL = {'name': 'look', 'arguments': {'call': 'Called7'}}


def template_warnings(tokenizer: Any, template: str) -> tuple[str, ...]:
  """Warnings about a template, one line each.

  Args:
    tokenizer: a Hugging Face tokenizer.
    template: Jinja source; '' for the tokenizer's own template.
  """
  try:
    rendered = chat_render.render_chat(
      Conversation(_CHAT), tokenizer, 'answers', template
    )
    render = chat_render.make_renderer(tokenizer, template, None)
    messages = chat_render.template_messages(Conversation(_CHAT[:1]), template)[
      0
    ]
    has_prompt = render(messages, True) != render(messages, False)
  except BadRow:
    # It needs other turns; errors are reported with the rows.
    return ()
  lines = []
  start, end = rendered.spans[-1] if rendered.spans else (0, 0)
  text_before, _, text_after = rendered.text[start:end].partition(_ANSWER)
  if not any(token in text_after for token in _special_tokens(tokenizer)):
    lines.append(
      'the chat template ends answers with no special token that is trained, '
      'so that the model does not learn to stop; name another with '
      'config.data.chat_template'
    )
  if not has_prompt and text_before.strip():
    lines.append(
      'the chat template does not heed add_generation_prompt: what begins an '
      f'answer, {text_before!r}, is trained and is for the model to write; '
      'name another with config.data.chat_template'
    )
  return tuple(lines)


def _special_tokens(tokenizer: Any) -> Sequence[str]:
  added = tokenizer.added_tokens_decoder.values()
  special = {token.content for token in added if token.special}
  return [*special, *tokenizer.all_special_tokens]


_OTHER_CALL = {'name': 'seek', 'arguments': {'y': 7}}
_TOOL = {
  'type': 'function',
  'function': {
    'name': 'Tool7',
    'description': 'It looks.',
    'parameters': {'type': 'object', 'properties': {}},
  },
}
_ID = 'abcdefgh7'


def _tool_chat(*calls: dict) -> tuple[Turn, ...]:
  """A conversation with a tool's calls and its result."""
  result = Turn('tool', _RESULT, name='look', call_id=_ID)
  return _CHAT[0], Turn('assistant', '', list(calls)), result, _CHAT[1]


# Feature -> a conversation that has it, and a word that its text must contain.
_FEATURES: dict[str, tuple[Conversation, str]] = {
  name: (Conversation(turns, tools), word)
  for name, turns, word, tools in (
    ("a system's turn", (Turn('system', 'System7'), *_CHAT), 'System7', None),
    ('tools', _CHAT, 'Tool7', [_TOOL]),
    ('a call of a tool', _tool_chat(_CALL), 'Called7', None),
    ('several calls at once', _tool_chat(_CALL, _OTHER_CALL), 'seek', None),
    ("a tool's turn", _tool_chat(_CALL), _RESULT, None),
    ('the id of a call', _tool_chat(_CALL | {'id': _ID}), _ID, None),
    (
      'an answer beside a call',
      (_CHAT[0], Turn('assistant', _ANSWER, [_CALL])),
      _ANSWER,
      None,
    ),
    (
      'a call beside an answer',
      (_CHAT[0], Turn('assistant', _ANSWER, [_CALL])),
      'Called7',
      None,
    ),
    (
      "a user's name",
      (Turn('user', _QUESTION, name='Name7'), _CHAT[1]),
      'Name7',
      None,
    ),
    (
      "an assistant's name",
      (_CHAT[0], Turn('assistant', _ANSWER, name='Name7')),
      'Name7',
      None,
    ),
  )
}


def dropped_features(tokenizer: Any, template: str) -> frozenset[str]:
  """The `_FEATURES` that a template leaves out without an error."""
  source, missing = chat_render.template_source(tokenizer, template), set()
  for feature, (conversation, word) in _FEATURES.items():
    try:
      messages, tools = chat_render.template_messages(conversation, source)
      render = chat_render.make_renderer(tokenizer, template, tools)
      text = render(messages, False)
    except BadRow:
      # The template raises an error, which is reported with the rows.
      continue
    if word.lower() not in text.lower():
      missing.add(feature)
  return frozenset(missing)


def _features(conversation: Conversation) -> set[str]:
  """The `_FEATURES` of a conversation that a template must render."""
  features = {'tools'} if conversation.tools else set()
  for turn in conversation.turns:
    if turn.role in ('system', 'tool'):
      features.add(f"a {turn.role}'s turn")
    elif turn.name:
      article = 'an' if turn.role == 'assistant' else 'a'
      features.add(f"{article} {turn.role}'s name")
    if turn.calls:
      features.add('a call of a tool')
    if len(turn.calls or ()) > 1:
      features.add('several calls at once')
    if turn.calls and turn.content:
      features |= {'an answer beside a call', 'a call beside an answer'}
  if not _in_order(conversation):
    features.add('the id of a call')
  return features


def _in_order(conversation: Conversation) -> bool:
  """Whether tools answer calls in the order in which they were called."""
  pending_ids: list[str] = []
  for turn in conversation.turns:
    if turn.calls:
      pending_ids = [call.get('id', '') for call in turn.calls]
    elif turn.role == 'tool' and pending_ids:
      expected = pending_ids.pop(0)
      if turn.call_id and expected and turn.call_id != expected:
        return False
  return True


def check_features(conversation: Conversation, missing: frozenset[str]) -> None:
  """
  Args:
    missing: the result of `dropped_features`.

  Raises:
    BadRow: the conversation has a feature that the template leaves out.
  """
  dropped = sorted(_features(conversation) & missing) if missing else []
  if dropped:
    raise BadRow(
      f'the row has {dropped[0]}, and the chat template leaves it out; name '
      'one that does not with config.data.chat_template, remove the row, or '
      'leave a field unused with config.data.ignore_fields=FIELD'
    )
