# SPDX-License-Identifier: Apache-2.0
"""Finds the character spans of answers in a rendered conversation."""

import re
from collections.abc import Callable, Sequence

from moepeft.data.example import BadRow

# (messages, add_generation_prompt) -> text
Render = Callable[[Sequence[dict], bool], str]
Span = tuple[int, int]

# The tags around answers in templates that mark generated text.
_GENERATION_TAG = re.compile(r'\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}')
# Private-use characters; a text that contains them is refused.
_BEGIN, _END = '\ue0a1', '\ue0a2'
_REWRITTEN = (
  'the chat template rewrites turn {}, so that its answer is not found '
  "exactly; name a template with '{{% generation %}}' by "
  "config.data.chat_template, or set config.data.train_on to 'all'"
)


def has_generation_tags(template: str) -> bool:
  """Whether a template has {% generation %} tags."""
  return _GENERATION_TAG.search(template) is not None


def mark_answers(template: str) -> str:
  """Replaces {% generation %} tags by characters that the template renders."""

  def replace(match: re.Match) -> str:
    left_trim, end, right_trim = match.groups()
    # Blocks on both sides keep Jinja's trimming of white space.
    mark = f'{{{{ "{_END if end else _BEGIN}" }}}}'
    return f'{{%{left_trim} if true %}}{mark}{{% endif {right_trim}%}}'

  return _GENERATION_TAG.sub(replace, template)


def marked_spans(marked_text: str, text: str) -> list[Span]:
  """[start, end) of the answers in `text`.

  Args:
    marked_text: the output of a template of `mark_answers`.
    text: the output of the template itself.

  Raises:
    BadRow: the two differ in more than the marks.
  """
  parts = re.split(f'[{_BEGIN}{_END}]', marked_text)
  spans, start = [], 0
  for i, part in enumerate(parts):
    if i % 2:
      spans.append((start, start + len(part)))
    start += len(part)
  if ''.join(parts) != text:
    raise BadRow(
      "what the chat template marks by '{% generation %}' is not found; name "
      'another with config.data.chat_template, or mend the row'
    )
  return [span for span in spans if span[0] < span[1]]


def find_answers(
  render: Render, messages: Sequence[dict], text: str
) -> list[Span]:
  """[start, end) of each turn of the assistant in a conversation's text.

  An answer is the text that its turn adds to the rendered turns before it with
  the generation prompt. Some templates (Qwen3's) render a last turn differently
  from the same turn in the middle; then the end of the answer is searched for
  before the next turn.

  Raises:
    BadRow: an answer is not found exactly.
  """
  spans, last_end = [], 0
  for i, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    prompt = render(messages[:i], True)
    prompt_and_answer = render(messages[: i + 1], False)
    start, end = len(prompt), -1
    if text.startswith(prompt) and last_end <= start:
      if text.startswith(prompt_and_answer) and prompt_and_answer.startswith(
        prompt
      ):
        end = len(prompt_and_answer)
      else:
        end = _find_end(render, messages, i, text, start)
    if end <= start:
      raise BadRow(_REWRITTEN.format(i))
    spans.append((start, end))
    last_end = end
  return spans


def _find_end(
  render: Render, messages: Sequence[dict], index: int, text: str, start: int
) -> int:
  """The end of an answer that is rendered differently as the last turn.

  Returns:
    -1 if it is not found.
  """
  content, next_start = messages[index]['content'].strip(), len(text)
  if index + 1 < len(messages):
    next_start = _content_start(render, messages, index + 1, text)
  end_text = _end_of_turn(render, messages[:index])
  if content and end_text:
    found_at = text.find(content + end_text, start, next_start)
    if found_at >= 0:
      return found_at + len(content) + len(end_text)
  if not end_text.strip() or text.count(end_text, start, next_start) != 1:
    return -1
  end = text.find(end_text, start)
  # The template may have added or removed thoughts, but not other text.
  answer = text[start:end].strip()
  matches = answer in content or content in answer
  return end + len(end_text) if matches else -1


def _content_start(
  render: Render, messages: Sequence[dict], index: int, text: str
) -> int:
  """The start of a turn's content: the first character that changes with it."""
  turn = messages[index]
  changed_messages = [*messages]
  changed_messages[index] = {**turn, 'content': _BEGIN + turn['content']}
  changed_text = render(changed_messages, False)
  pairs = zip(text, changed_text, strict=False)
  return next(
    (i for i, (x, y) in enumerate(pairs) if x != y),
    min(len(text), len(changed_text)),
  )


def _end_of_turn(render: Render, messages: Sequence[dict]) -> str:
  """The text that the template writes after an answer to these turns."""
  answer = {'role': 'assistant', 'content': _BEGIN}
  return render([*messages, answer], False).rpartition(_BEGIN)[2]
