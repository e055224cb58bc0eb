# SPDX-License-Identifier: Apache-2.0
"""Where the answers of a conversation stand in a chat template's text."""

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
  """Whether a template says itself what is generated."""
  return _MARK.search(template) is not None


def show_marks(template: str) -> str:
  """The same template with a character where an answer begins or ends."""

  def seen(found: re.Match) -> str:
    before, end, after = found.groups()
    # Blocks as they were on either side, where Jinja trims what is blank.
    mark = f'{{{{ "{_END if end else _BEGIN}" }}}}'
    return f'{{%{before} if true %}}{mark}{{% endif {after}%}}'

  return _MARK.sub(seen, template)


def marked_spans(text: str, whole: str) -> list[Span]:
  """[start, end) of the answers that a template of `shown` marks.

  Raises:
    BadRow: `whole` is another text.
  """
  found, at, plain = [], 0, []
  for begun, part in enumerate(re.split(f'[{_BEGIN}{_END}]', text)):
    if begun % 2:
      found.append((at, at + len(part)))
    at += len(part)
    plain.append(part)
  if ''.join(plain) != whole:
    raise BadRow(
      "what the chat template marks by '{% generation %}' is not found; name "
      'another with config.data.chat_template, or mend the row'
    )
  return [span for span in found if span[0] < span[1]]


def find_answers(
  render: Render, some: Sequence[dict], whole: str
) -> list[Span]:
  """[start, end) of the assistant's turns in the whole text, one each.

  An answer is what rendering with its turn adds to rendering what stands
  before it and the generation prompt. A template that renders a last turn
  otherwise than the same turn later on (Qwen3 does) is met by looking for the
  turn's end before the next turn.

  Raises:
    BadRow: they are not found exactly.
  """
  found, last = [], 0
  for i, message in enumerate(some):
    if message['role'] != 'assistant':
      continue
    before, after = render(some[:i], True), render(some[: i + 1], False)
    start, end = len(before), -1
    if whole.startswith(before) and last <= start:
      if whole.startswith(after) and after.startswith(before):
        end = len(after)
      else:
        end = _end(render, some, i, whole, start)
    if end <= start:
      raise BadRow(_REWRITTEN.format(i))
    found.append((start, end))
    last = end
  return found


def _end(
  render: Render, some: Sequence[dict], place: int, whole: str, start: int
) -> int:
  """Where a turn ends that was rendered otherwise by itself; -1 if nowhere."""
  said, next_begins = some[place]['content'].strip(), len(whole)
  if place + 1 < len(some):
    next_begins = _content(render, some, place + 1, whole)
  tail = _tail(render, some[:place])
  at = whole.find(said + tail, start, next_begins) if said and tail else -1
  if at >= 0:
    return at + len(said) + len(tail)
  if not tail.strip() or whole.count(tail, start, next_begins) != 1:
    return -1
  at = whole.find(tail, start)
  # Without its thoughts, or with them: but the same answer.
  kept = whole[start:at].strip()
  return at + len(tail) if kept in said or said in kept else -1


def _content(
  render: Render, some: Sequence[dict], place: int, whole: str
) -> int:
  """Where what a turn says begins, by what another text there changes."""
  turn = some[place]
  other = [*some]
  other[place] = {**turn, 'content': _BEGIN + turn['content']}
  changed = render(other, False)
  pairs = zip(whole, changed, strict=False)
  return next(
    (i for i, (x, y) in enumerate(pairs) if x != y),
    min(len(whole), len(changed)),
  )


def _tail(render: Render, before: Sequence[dict]) -> str:
  """What ends an answer after these turns."""
  answer = {'role': 'assistant', 'content': _BEGIN}
  return render([*before, answer], False).rpartition(_BEGIN)[2]
