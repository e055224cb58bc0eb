# SPDX-License-Identifier: Apache-2.0
"""Parts of a conversation that a chat template leaves out.

They are found by rendering made up conversations.
"""

from collections.abc import Sequence
from typing import Any

from moepeft.data.chat import render as chat_render
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow

_QUESTION, _ANSWER, _RESULT = 'Question7', 'Answer7', 'Result7'
_TALK = (Turn('user', _QUESTION), Turn('assistant', _ANSWER))
_CALL = {'name': 'look', 'arguments': {'call': 'Called7'}}


def template_warnings(tokenizer: Any, template: str) -> tuple[str, ...]:
  """Warnings about a template, one line each.

  Args:
    tokenizer: of Hugging Face; template: Jinja, '' for the tokenizer's own.
  """
  try:
    rendered = chat_render.render_chat(
      Conversation(_TALK), tokenizer, 'answers', template
    )
    render = chat_render.make_renderer(tokenizer, template, None)
    messages = chat_render.template_messages(Conversation(_TALK[:1]), template)[
      0
    ]
    begun = render(messages, True) != render(messages, False)
  except BadRow:
    # It wants other turns; rows say what is wrong with it, if anything is.
    return ()
  lines = []
  start, end = rendered.spans[-1] if rendered.spans else (0, 0)
  text_before, _, text_after = rendered.text[start:end].partition(_ANSWER)
  if not any(token in text_after for token in _ends(tokenizer)):
    lines.append(
      'the chat template ends answers with no special token that is trained, '
      'so that the model does not learn to stop; name another with '
      'config.data.chat_template'
    )
  if not begun and text_before.strip():
    lines.append(
      'the chat template does not heed add_generation_prompt: what begins an '
      f'answer, {text_before!r}, is trained and is for the model to write; '
      'name another with config.data.chat_template'
    )
  return tuple(lines)


def _ends(tokenizer: Any) -> Sequence[str]:
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


def _answered(*calls: dict) -> tuple[Turn, ...]:
  """A talk in which a tool is called and answers."""
  result = Turn('tool', _RESULT, name='look', call_id=_ID)
  return _TALK[0], Turn('assistant', '', list(calls)), result, _TALK[1]


# What a conversation may have besides turns of a user and an assistant: a
# talk that has it, and a word that its text must hold.
_FEATURES: dict[str, tuple[Conversation, str]] = {
  name: (Conversation(turns, tools), word)
  for name, turns, word, tools in (
    ("a system's turn", (Turn('system', 'System7'), *_TALK), 'System7', None),
    ('tools', _TALK, 'Tool7', [_TOOL]),
    ('a call of a tool', _answered(_CALL), 'Called7', None),
    ('several calls at once', _answered(_CALL, _OTHER_CALL), 'seek', None),
    ("a tool's turn", _answered(_CALL), _RESULT, None),
    ('the id of a call', _answered(_CALL | {'id': _ID}), _ID, None),
    (
      'an answer beside a call',
      (_TALK[0], Turn('assistant', _ANSWER, [_CALL])),
      _ANSWER,
      None,
    ),
    (
      'a call beside an answer',
      (_TALK[0], Turn('assistant', _ANSWER, [_CALL])),
      'Called7',
      None,
    ),
    (
      "a user's name",
      (Turn('user', _QUESTION, name='Name7'), _TALK[1]),
      'Name7',
      None,
    ),
    (
      "an assistant's name",
      (_TALK[0], Turn('assistant', _ANSWER, name='Name7')),
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
      whole = chat_render.make_renderer(tokenizer, template, tools)(
        messages, False
      )
    except BadRow:
      # It refuses them: each row is told so.
      continue
    if word.lower() not in whole.lower():
      missing.add(feature)
  return frozenset(missing)


def _features(conversation: Conversation) -> set[str]:
  """The `_FEATURES` that a conversation has and cannot be without."""
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
  waiting: list[str] = []
  for turn in conversation.turns:
    if turn.calls:
      waiting = [call.get('id', '') for call in turn.calls]
    elif turn.role == 'tool' and waiting:
      due = waiting.pop(0)
      if turn.call_id and due and turn.call_id != due:
        return False
  return True


def check_features(conversation: Conversation, missing: frozenset[str]) -> None:
  """
  Args:
    missing: the result of `dropped_features`.

  Raises:
    BadRow: the conversation has what the template leaves out.
  """
  dropped = sorted(_features(conversation) & missing) if missing else []
  if dropped:
    raise BadRow(
      f'the row has {dropped[0]}, and the chat template leaves it out; name '
      'one that does not with config.data.chat_template, remove the row, or '
      'leave a field unused with config.data.ignore_fields=FIELD'
    )
