# SPDX-License-Identifier: Apache-2.0
"""What a chat template leaves out, found by rendering a made up talk."""

from collections.abc import Sequence
from typing import Any

from moepeft.data import chat_text
from moepeft.data.conversations import Conversation, Turn
from moepeft.data.rows import BadRow

_ASKED, _SAID, _RESULT = 'Question7', 'Answer7', 'Result7'
_TALK = (Turn('user', _ASKED), Turn('assistant', _SAID))
_CALL = {'name': 'look', 'arguments': {'x': 7}}


def remarks(tokenizer: Any, template: str) -> tuple[str, ...]:
  """What a user must know of a template, one line each.

  Args:
    tokenizer: of Hugging Face; template: Jinja, '' for the tokenizer's own.
  """
  try:
    found = chat_text.text(Conversation(_TALK), tokenizer, 'answers', template)
    render = chat_text.renderer(tokenizer, template, None)
    asked = chat_text.messages(Conversation(_TALK[:1]), template)[0]
    begun = render(asked, True) != render(asked, False)
  except BadRow:
    # It wants other turns; rows say what is wrong with it, if anything is.
    return ()
  lines = []
  start, end = found.spans[-1] if found.spans else (0, 0)
  before, _, after = found.whole[start:end].partition(_SAID)
  if not any(token in after for token in _ends(tokenizer)):
    lines.append(
      'the chat template ends answers with no special token that is trained, '
      'so that the model does not learn to stop; name another with '
      'config.data.chat_template'
    )
  if not begun and before.strip():
    lines.append(
      'the chat template does not heed add_generation_prompt: what begins an '
      f'answer, {before!r}, is trained and is for the model to write; name '
      'another with config.data.chat_template'
    )
  return tuple(lines)


def _ends(tokenizer: Any) -> Sequence[str]:
  added = tokenizer.added_tokens_decoder.values()
  special = {token.content for token in added if token.special}
  return [*special, *tokenizer.all_special_tokens]


def writes_results(tokenizer: Any, template: str) -> bool:
  """Whether what tools answer is in a template's text."""
  turns = (
    _TALK[0],
    Turn('assistant', '', [_CALL]),
    Turn('tool', _RESULT),
    _TALK[1],
  )
  try:
    used = chat_text.all_of(tokenizer, template)
    some, tools = chat_text.messages(Conversation(turns), used)
    whole = chat_text.renderer(tokenizer, template, tools)(some, False)
  except BadRow:
    # It refuses them: each row is told so.
    return True
  return _RESULT in whole
