# SPDX-License-Identifier: Apache-2.0
"""Conversations as ids, by a chat template, with the answers trained.

`render` and `answer_spans` have the template's text and the answers in it,
`tokenize` its ids, and `truncate` cuts them to a row.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from moepeft.data.batching.decoder_only import Sample
from moepeft.data.chat import formats as chat_formats
from moepeft.data.chat import render as chat_render
from moepeft.data.chat import template as chat_template
from moepeft.data.chat import template_check, tokenize
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.chat.render import RenderedChat
from moepeft.data.chat.truncate import truncate_chat
from moepeft.data.example import BadRow, BadRows
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer

TRAIN_ON = ('answers', 'all')
# Conversations that are tokenized at once.
_BATCH = 256
# Seconds until reading says how far it is, and between two such lines.
_QUIET = 3.0


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template with its settings: conversations to ids.

  Attributes:
    tokenizer: of Hugging Face, a fast one.
    text: Jinja; '' for the tokenizer's own.
    train_on: 'answers', or 'all'.
    system: put before conversations without a system's turn.
    date: what the template writes as today's; see `chat_template.dated`.

  Raises:
    ValueError: there is no template, it draws at random, or `train_on` is
      neither.
  """

  tokenizer: Any
  text: str = ''
  train_on: str = 'answers'
  system: str = ''
  date: str = ''

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
    chat_template.check_fixed(self._whole)

  def write(self, conversation: Conversation) -> RenderedChat:
    """A conversation's text; see `chat_text.text`.

    Raises:
      BadRow: the template cannot render it, or leaves out part of it.
    """
    conversation = self._with_system(conversation)
    template_check.check_written(conversation, self._left_out)
    text = chat_render.render_chat(
      conversation, self.tokenizer, self.train_on, self._dated
    )
    chat_template.check_written(
      text.whole, (t.content for t in conversation.turns)
    )
    return text

  @functools.cached_property
  def remarks(self) -> tuple[str, ...]:
    """Lines for the user; see `chat_probe.remarks`."""
    return template_check.template_warnings(self.tokenizer, self.text)

  @functools.cached_property
  def _left_out(self) -> frozenset[str]:
    return template_check.dropped_features(self.tokenizer, self.text)

  @property
  def _whole(self) -> str:
    return chat_render.template_source(self.tokenizer, self.text)

  @functools.cached_property
  def _dated(self) -> str:
    """The text, with its date; '' for the tokenizer's own as it is."""
    if not self.date or not chat_template.reads_clock(self._whole):
      return self.text
    template = self.text or self.tokenizer.chat_template
    if not isinstance(template, str):
      raise ValueError(
        'the tokenizer has several chat templates and one of them asks for '
        'the date; name one with config.data.chat_template'
      )
    return chat_template.fix_date(template, self.date)

  def encode(self, texts: Sequence[RenderedChat]) -> list[Sample]:
    """See `chat_ids.samples`."""
    return tokenize.encode_chats(self.tokenizer, texts)

  def render(self, conversation: Conversation) -> Sample:
    """A conversation's ids.

    Raises:
      BadRow: the template cannot render it, or hides its answers.
    """
    (sample,) = self.encode([self.write(conversation)])
    return sample

  def prompt(self, conversation: Conversation) -> list[int]:
    """The ids of a conversation up to where the assistant speaks.

    Raises:
      BadRow: the template cannot render it.
    """
    conversation = self._with_system(conversation)
    text = chat_render.render_prompt(conversation, self.tokenizer, self._dated)
    return self.tokenizer(text, add_special_tokens=False)['input_ids']

  def ends(self) -> list[int]:
    """The special token that ends an answer; [] where none does."""
    conversation = Conversation((Turn('user', 'a'), Turn('assistant', 'b')))
    try:
      sample = self.render(conversation)
    except BadRow:
      # Of what it cannot render, nothing is asked either.
      return []
    last = sample.ids[sample.loss_mask][-1:].tolist()
    return [i for i in last if i in tokenize.special_ids(self.tokenizer)]

  def _with_system(self, conversation: Conversation) -> Conversation:
    if not self.system or conversation.turns[0].role == 'system':
      return conversation
    turns = (Turn('system', self.system), *conversation.turns)
    return dataclasses.replace(conversation, turns=turns)


def load_chat_template(data: ConfigDict, tokenizer: Tokenizer) -> ChatTemplate:
  """The template of a config.

  Raises:
    ValueError: there is none, or the vocabulary is of bytes.
  """
  if not isinstance(tokenizer, HuggingFaceTokenizer):
    raise ValueError(
      f'conversations need a tokenizer with a chat template, and the '
      f'vocabulary is {tokenizer}; set config.data.tokenizer'
    )
  return ChatTemplate(
    tokenizer.tokenizer,
    chat_template.read(data.chat_template),
    data.train_on,
    data.system_prompt,
    data.date,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class ChatExample:
  """A conversation that fits a row.

  Attributes:
    sample: its ids.
    group: its beginning, the system's turn and the first question:
      conversations that begin alike are held out together.
  """

  sample: Sample
  group: tuple[str, ...]


def read_chats(
  data: ConfigDict, tokenizer: Tokenizer, max_length: int = 0
) -> tuple[dict[str, list[ChatExample]], tuple[str, ...]]:
  """({file: its conversations that fit a row}, lines for the user).

  Args:
    max_length: tokens of a row that a conversation may fill; 0 for
      config.data.length.

  Raises:
    ValueError: nothing to read or to train, or a bad row.
  """
  template, bad = (
    load_chat_template(data, tokenizer),
    BadRows(data.on_bad_row, data.ignore_fields),
  )
  chats: dict[str, list[ChatExample]] = {}
  cut = dropped = 0
  rows = _with_progress(chat_formats.read_rows(data.path, bad), data.path)
  while batch := list(itertools.islice(rows, _BATCH)):
    for file, chat in _read(
      batch, template, data, bad, max_length or data.length
    ):
      if chat is None:
        dropped += 1
        continue
      cut += chat.sample.cut
      chats.setdefault(file, []).append(chat)
  count = sum(map(len, chats.values()))
  notes = _notes(data, bad, count, cut, dropped)
  return chats, (*notes, *template.remarks)


def _read(
  rows: Sequence[tuple[str, str, dict]],
  template: ChatTemplate,
  data: ConfigDict,
  bad: BadRows,
  max_length: int,
) -> Iterator[tuple[str, ChatExample | None]]:
  """(file, conversation) of each good row; None where nothing of it fits."""
  good, texts = [], []
  for file, where, row in rows:
    try:
      conversation = chat_formats.check_answered(
        chat_formats.parse_conversation(row, data.format, bad.unused)
      )
      texts.append(template.write(conversation))
      good.append((file, where, conversation))
    except BadRow as e:
      bad(where, e)
  for (file, where, conversation), whole in zip(
    good, template.encode(texts), strict=True
  ):
    try:
      yield (
        file,
        _fitted(conversation, whole, template, data.truncation, max_length + 1),
      )
    except BadRow as e:
      bad(where, e)


def _fitted(
  conversation: Conversation,
  sample: Sample,
  template: ChatTemplate,
  too_long: str,
  most: int,
) -> ChatExample | None:
  if not sample.has_targets:
    raise BadRow('no token of it is trained; mend or remove the row')
  if len(sample.ids) > most:
    sample = truncate_chat(conversation, template.render, most, too_long)
  first = next(i for i, t in enumerate(conversation.turns) if t.role == 'user')
  group = tuple(turn.content for turn in conversation.turns[: first + 1])
  return sample and ChatExample(sample, group)


def _with_progress(rows: Iterable, path: str) -> Iterator:
  """The rows; a line says how many were read where that takes long."""
  last, has_reported = time.monotonic(), False
  for count, row in enumerate(rows):
    if time.monotonic() - last > _QUIET:
      print(f'\r{path}: {count:,} rows read', end='', file=sys.stderr)
      last, has_reported = time.monotonic(), True
    yield row
  if has_reported:
    print(file=sys.stderr)


def _notes(
  data: ConfigDict, bad: BadRows, count: int, cut: int, dropped: int
) -> list[str]:
  """Lines for the user on the rows that were read, cut and dropped.

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
      f'and are cut (config.data.truncation={data.truncation!r})'
    )
  if dropped:
    lines.append(
      f'{dropped:,} conversations are dropped: longer than config.data.length='
      f'{data.length}, with config.data.truncation={data.truncation!r}'
      + ' and no room for the last answer'
      * (data.truncation == 'prompt')
    )
  if not count and len(lines) == 1:
    raise ValueError(f'{data.path} is empty; expected conversations in it')
  lines += bad.notes(data.path)
  if not count:
    raise ValueError(
      f'{data.path} leaves no conversation to train on'
      + ''.join(f'; {line}' for line in lines[1:])
    )
  return lines
