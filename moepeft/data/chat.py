# SPDX-License-Identifier: Apache-2.0
"""Conversations as ids, by a chat template, with the answers trained.

What is trained of an answer is what a model is to say after the template's
generation prompt: all up to the end-of-turn token, which is trained too.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np
from ml_collections import ConfigDict

from moepeft.data import conversations as forms
from moepeft.data.causal import Sample, shortened
from moepeft.data.chat_template import read
from moepeft.data.conversations import Conversation, Turn
from moepeft.data.rows import Bad, BadRow
from moepeft.data.vocabulary import Tokenizer, Vocabulary

TRAIN_ON = ('answers', 'all')
# What marks answers in templates that say themselves what is generated.
_MARK = '{% generation'
_TOOLS = (
  'You may call these tools, each a JSON schema. To call one, answer with '
  '<tool_call>{"name": ..., "arguments": ...}</tool_call>.\n'
)
# (messages, whether the next answer is begun) -> text
Render = Callable[[Sequence[dict], bool], str]


@dataclasses.dataclass(frozen=True)
class Template:
  """How conversations become ids.

  Attributes:
    tokenizer: of Hugging Face, a fast one.
    text: Jinja; '' for the tokenizer's own.
    train_on: 'answers', or 'all'.
    system: put before conversations without a system's turn.

  Raises:
    ValueError: there is no template, or `train_on` is neither.
  """

  tokenizer: Any
  text: str = ''
  train_on: str = 'answers'
  system: str = ''

  def __post_init__(self):
    if self.train_on not in TRAIN_ON:
      raise ValueError(
        f'config.data.train_on is one of {", ".join(TRAIN_ON)}; got '
        f'{self.train_on!r}'
      )
    if not self.text and not self.tokenizer.chat_template:
      raise ValueError(
        'the tokenizer has no chat template; name a Jinja file with '
        'config.data.chat_template'
      )

  def render(self, found: Conversation) -> Sample:
    """See the function `render`."""
    found = self._with_system(found)
    return render(found, self.tokenizer, self.train_on, self.text)

  def prompt(self, found: Conversation) -> list[int]:
    """The ids of a conversation up to where the assistant speaks.

    Raises:
      BadRow: the template cannot render it.
    """
    found = self._with_system(found)
    some, tools = messages(found, _own_template(self.tokenizer, self.text))
    text = renderer(self.tokenizer, self.text, tools)(some, True)
    return self.tokenizer(text, add_special_tokens=False)['input_ids']

  def ends(self) -> list[int]:
    """The special token that ends an answer; [] where none does."""
    talk = Conversation((Turn('user', 'a'), Turn('assistant', 'b')))
    try:
      found = self.render(talk)
    except BadRow:
      # Of what it cannot render, nothing is asked either.
      return []
    last = found.ids[found.trained][-1:].tolist()
    return [i for i in last if i in _special(self.tokenizer)]

  def _with_system(self, found: Conversation) -> Conversation:
    if not self.system or found.turns[0].role == 'system':
      return found
    turns = (Turn('system', self.system), *found.turns)
    return dataclasses.replace(found, turns=turns)


def template(data: ConfigDict, words: Vocabulary) -> Template:
  """The template of a config.

  Raises:
    ValueError: there is none, or the vocabulary is of bytes.
  """
  if not isinstance(words, Tokenizer):
    raise ValueError(
      f'conversations need a tokenizer with a chat template, and the '
      f'vocabulary is {words}; set config.data.vocabulary'
    )
  text = read(data.chat_template)
  return Template(words.tokenizer, text, data.train_on, data.system)


def messages(found: Conversation, template: str) -> tuple[list[dict], Any]:
  """(turns as the template reads them, tools).

  Where it has no words for calls or tools, they are written into the turns as
  JSON.
  """
  turns, tools = list(found.turns), found.tools
  if tools and 'tools' not in template:
    said = _TOOLS + '\n'.join(json.dumps(t['function']) for t in tools)
    tools = None
    if turns[0].role == 'system':
      said = f'{turns.pop(0).content}\n\n{said}'
    turns.insert(0, Turn('system', said))
  made = []
  for turn in turns:
    message = {'role': turn.role, 'content': turn.content}
    if turn.calls and 'tool_calls' in template:
      message['tool_calls'] = [
        {'type': 'function', 'function': call} for call in turn.calls
      ]
    elif turn.calls:
      calls = (f'<tool_call>{json.dumps(c)}</tool_call>' for c in turn.calls)
      message['content'] = '\n'.join([turn.content, *calls]).lstrip('\n')
    made.append(message)
  return made, tools


def renderer(tokenizer: Any, template: str, tools: Any) -> Render:
  """Texts of messages by a template, whose failure is a bad row."""

  def text(some: Sequence[dict], begun: bool) -> str:
    try:
      return tokenizer.apply_chat_template(
        list(some),
        tools=tools,
        chat_template=template or None,
        tokenize=False,
        add_generation_prompt=begun,
      )
    # A template is a program: there is no list of what it may raise.
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as e:
      raise BadRow(
        f'the chat template cannot render the conversation ({e}); mend its '
        'turns or the template'
      ) from None

  return text


def _own_template(tokenizer: Any, template: str) -> str:
  """The text of the template that is used."""
  own = template or tokenizer.chat_template
  return own if isinstance(own, str) else '\n'.join(own.values())


def render(
  conversation: Conversation,
  tokenizer: Any,
  train_on: str = 'answers',
  template: str = '',
) -> Sample:
  """A conversation's ids, those of the template's own text.

  Args:
    train_on: 'answers', or 'all'.
    template: Jinja; '' for the tokenizer's own.

  Raises:
    BadRow: the template cannot render it, or rewrites turns so that answers
      cannot be found in its text exactly.
  """
  used = _own_template(tokenizer, template)
  some, tools = messages(conversation, used)
  text = renderer(tokenizer, template, tools)
  whole = text(some, False)
  found = tokenizer(
    whole, add_special_tokens=False, return_offsets_mapping=True
  )
  ids = np.array(found['input_ids'], np.int32)
  if train_on == 'all':
    return Sample(ids, np.ones(len(ids), bool))
  if _MARK in used.replace('{%-', '{%'):
    marked = tokenizer.apply_chat_template(
      some,
      tools=tools,
      chat_template=template or None,
      return_dict=True,
      return_assistant_tokens_mask=True,
    )
    return Sample(
      np.array(marked['input_ids'], np.int32),
      np.array(marked['assistant_masks'], bool),
    )
  special = _special(tokenizer)
  offsets = np.array(found['offset_mapping']).reshape(-1, 2)
  trained = np.zeros(len(ids), bool)
  for start, end in spans(text, some, whole):
    own = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 0] < end))
    trained[_up_to_the_end(own, ids, special, tokenizer)] = True
  return Sample(ids, trained)


def _special(tokenizer: Any) -> set[int]:
  added = tokenizer.added_tokens_decoder.items()
  marked = {i for i, token in added if token.special}
  return marked | set(tokenizer.all_special_ids)


def _up_to_the_end(
  own: np.ndarray, ids: np.ndarray, special: set[int], tokenizer: Any
) -> np.ndarray:
  """An answer's places without the blanks after its end-of-turn token."""
  ends = [i for i, place in enumerate(own) if int(ids[place]) in special]
  if ends and not tokenizer.decode(ids[own[ends[-1] + 1 :]].tolist()).strip():
    return own[: ends[-1] + 1]
  return own


def spans(
  text: Render, some: Sequence[dict], whole: str
) -> list[tuple[int, int]]:
  """Where the answers stand in the whole text, [start, end).

  An answer is what rendering with its turn adds to rendering what stands
  before it and the generation prompt. A template that renders a last turn
  otherwise than the same turn later on (Qwen3 does) is met by looking for the
  turn's text and what it ends with.

  Raises:
    BadRow: they are not found exactly.
  """
  found = []
  for i, message in enumerate(some):
    if message['role'] != 'assistant':
      continue
    before, after = text(some[:i], True), text(some[: i + 1], False)
    start = len(before)
    if whole.startswith(before) and whole.startswith(after):
      end = len(after) if after.startswith(before) else -1
    else:
      end = _end(whole, start, after, message['content'])
    if not whole.startswith(before) or end <= start:
      raise BadRow(
        f'the chat template rewrites turn {i}, so that its answer is not found '
        "exactly; name a template with '{% generation %}' by "
        "config.data.chat_template, or set config.data.train_on to 'all'"
      )
    found.append((start, end))
  return found


def _end(whole: str, start: int, after: str, content: str) -> int:
  """Where a turn ends that was rendered otherwise by itself; -1 if nowhere."""
  said = content.strip()
  _, found, tail = after.rpartition(said)
  at = whole.find(said, start)
  if not said or not found or at < 0:
    return -1
  end = at + len(said) + len(tail)
  return end if whole[at + len(said) : end] == tail else -1


def fitted(
  found: Conversation,
  make: Callable[[Conversation], Sample],
  most: int,
  too_long: str,
) -> Sample | None:
  """A conversation in at most so many ids.

  Args:
    make: renders it.
    too_long: 'prompt' drops the oldest exchanges, then the beginnings of what
      is left of the prompt (the system's turn stays whole), and cuts the
      last answer only where it alone is too long; 'end' cuts; 'drop' drops.

  Returns:
    None where nothing is left to train.
  """
  whole = make(found)
  if len(whole.ids) <= most or too_long != 'prompt':
    return shortened(whole, most, too_long)
  found = _without_oldest(found, lambda c: len(make(c).ids) <= most)
  for i, turn in enumerate(found.turns):
    if turn.role in ('user', 'tool') and len(make(found).ids) > most:
      found = _without_beginning(found, i, lambda c: len(make(c).ids) <= most)
  short = shortened(make(found), most, too_long)
  return short and dataclasses.replace(short, cut=True)


def _least(count: int, holds: Callable[[int], bool]) -> int:
  """The least number up to `count` that holds, `count` if none does."""
  low, high = 0, count
  while low < high:
    middle = (low + high) // 2
    if holds(middle):
      high = middle
    else:
      low = middle + 1
  return low


def _without_oldest(
  found: Conversation, fits: Callable[[Conversation], bool]
) -> Conversation:
  turns = found.turns
  begins = [i for i, turn in enumerate(turns) if turn.role == 'user']
  head, first = turns[: begins[0]], begins

  def rest(dropped: int) -> Conversation:
    return dataclasses.replace(found, turns=head + turns[first[dropped] :])

  # The last question and what answers it stay.
  last = max((i for i, b in enumerate(begins) if b < len(turns) - 1), default=0)
  return rest(_least(last, lambda n: fits(rest(n))))


def _without_beginning(
  found: Conversation, place: int, fits: Callable[[Conversation], bool]
) -> Conversation:
  turn = found.turns[place]

  def rest(dropped: int) -> Conversation:
    short = dataclasses.replace(turn, content=turn.content[dropped:])
    turns = (*found.turns[:place], short, *found.turns[place + 1 :])
    return dataclasses.replace(found, turns=turns)

  # At least a character stays: templates may leave out empty turns.
  most = len(turn.content.rstrip()) - 1
  return rest(_least(most, lambda n: fits(rest(n))))


def samples(
  data: ConfigDict, words: Vocabulary
) -> tuple[dict[str, list[Sample]], tuple[str, ...]]:
  """({file: its conversations as ids that fit a row}, lines for the user).

  Raises:
    ValueError: nothing to read or to train, or a bad row.
  """
  used, bad = template(data, words), Bad(data.on_bad_row)
  most = data.length + 1
  found: dict[str, list[Sample]] = {}
  cut = dropped = 0
  for file, where, row in forms.rows(data.path, bad):
    try:
      talk = forms.answered(forms.conversation(row, data.form))
      whole = used.render(talk)
      if not whole.teaches:
        raise BadRow('no token of it is trained; mend or remove the row')
      short = whole
      if len(whole.ids) > most:
        short = fitted(talk, used.render, most, data.too_long)
      if short is None:
        dropped += 1
        continue
      cut += short.cut
      found.setdefault(file, []).append(short)
    except BadRow as e:
      bad(where, e)
  count = sum(map(len, found.values()))
  return found, tuple(_notes(data, bad, count, cut, dropped))


def _notes(
  data: ConfigDict, bad: Bad, count: int, cut: int, dropped: int
) -> list[str]:
  """What became of the rows.

  Raises:
    ValueError: none is left.
  """
  lines = [f'{data.path}: {count:,} conversations']
  if bad.reasons:
    lines.append(
      f'skipped {len(bad.reasons):,} bad rows of {data.path}, the first: '
      f'{bad.reasons[0]}'
    )
  if cut:
    lines.append(
      f'{cut:,} conversations are longer than config.data.length={data.length} '
      f'and are cut (config.data.too_long={data.too_long!r})'
    )
  if dropped:
    lines.append(
      f'{dropped:,} conversations are dropped: longer than config.data.length='
      f'{data.length}, with config.data.too_long={data.too_long!r}'
    )
  if not count:
    raise ValueError(
      f'{data.path} leaves no conversation to train on'
      + ''.join(f'; {line}' for line in lines[1:])
    )
  return lines
