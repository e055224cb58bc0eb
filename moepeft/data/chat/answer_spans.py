# SPDX-License-Identifier: Apache-2.0
"""Spans of a conversation's answers in the text of a chat template."""

import re
from collections.abc import Callable, Sequence

from moepeft.data.example import BadRow

# (messages, whether the next answer is begun) -> text
Render = Callable[[Sequence[dict], bool], str]
Span = tuple[int, int]

# What marks answers in templates that say themselves what is generated.
_MARK = re.compile(r'\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}')
# No text has them: they are for private use, and texts that do are refused.
_BEGIN, _END = '\ue0a1', '\ue0a2'
_REWRITTEN = (
  'the chat template rewrites turn {}, so that its answer is not found '
  "exactly; name a template with '{{% generation %}}' by "
  "config.data.chat_template, or set config.data.train_on to 'all'"
)


def has_generation_marks(template: str) -> bool:
  """Whether a template marks generated text by {% generation %}."""
  return _MARK.search(template) is not None


def show_marks(template: str) -> str:
  """The same template with a character where an answer begins or ends."""

  def replace(match: re.Match) -> str:
    left_trim, end, right_trim = match.groups()
    # Blocks as they were on either side, where Jinja trims what is blank.
    mark = f'{{{{ "{_END if end else _BEGIN}" }}}}'
    return f'{{%{left_trim} if true %}}{mark}{{% endif {right_trim}%}}'

  return _MARK.sub(replace, template)


def marked_spans(text: str, whole: str) -> list[Span]:
  """[start, end) of the answers that a template of `shown` marks.

  Raises:
    BadRow: `whole` is another text.
  """
  spans, at, plain = [], 0, []
  for begun, part in enumerate(re.split(f'[{_BEGIN}{_END}]', text)):
    if begun % 2:
      spans.append((at, at + len(part)))
    at += len(part)
    plain.append(part)
  if ''.join(plain) != whole:
    raise BadRow(
      "what the chat template marks by '{% generation %}' is not found; name "
      'another with config.data.chat_template, or mend the row'
    )
  return [span for span in spans if span[0] < span[1]]


def find_answers(
  render: Render, messages: Sequence[dict], whole: str
) -> list[Span]:
  """[start, end) of the assistant's turns in the whole text, one each.

  An answer is what rendering with its turn adds to rendering what stands
  before it and the generation prompt. A template that renders a last turn
  otherwise than the same turn later on (Qwen3 does) is met by looking for the
  turn's end before the next turn.

  Raises:
    BadRow: they are not found exactly.
  """
  spans, last = [], 0
  for i, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    text_before, text_after = (
      render(messages[:i], True),
      render(messages[: i + 1], False),
    )
    start, end = len(text_before), -1
    if whole.startswith(text_before) and last <= start:
      if whole.startswith(text_after) and text_after.startswith(text_before):
        end = len(text_after)
      else:
        end = _end(render, messages, i, whole, start)
    if end <= start:
      raise BadRow(_REWRITTEN.format(i))
    spans.append((start, end))
    last = end
  return spans


def _end(
  render: Render, messages: Sequence[dict], place: int, whole: str, start: int
) -> int:
  """The end of a turn that was rendered otherwise by itself; -1 if none."""
  content, next_begins = messages[place]['content'].strip(), len(whole)
  if place + 1 < len(messages):
    next_begins = _content(render, messages, place + 1, whole)
  tail = _tail(render, messages[:place])
  at = (
    whole.find(content + tail, start, next_begins) if content and tail else -1
  )
  if at >= 0:
    return at + len(content) + len(tail)
  if not tail.strip() or whole.count(tail, start, next_begins) != 1:
    return -1
  at = whole.find(tail, start)
  # Without its thoughts, or with them: but the same answer.
  text = whole[start:at].strip()
  return at + len(tail) if text in content or content in text else -1


def _content(
  render: Render, messages: Sequence[dict], place: int, whole: str
) -> int:
  """The start of a turn's content: the first place that another content
  changes."""
  turn = messages[place]
  changed_messages = [*messages]
  changed_messages[place] = {**turn, 'content': _BEGIN + turn['content']}
  changed = render(changed_messages, False)
  pairs = zip(whole, changed, strict=False)
  return next(
    (i for i, (x, y) in enumerate(pairs) if x != y),
    min(len(whole), len(changed)),
  )


def _tail(render: Render, messages: Sequence[dict]) -> str:
  """The text that ends an answer after these turns."""
  answer = {'role': 'assistant', 'content': _BEGIN}
  return render([*messages, answer], False).rpartition(_BEGIN)[2]
