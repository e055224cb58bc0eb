# SPDX-License-Identifier: Apache-2.0
"""Reads conversations, applies a chat template and tokenizes the result.

`render` and `answer_spans` render the text and locate its answers, `tokenize`
makes ids and a loss mask, and `truncate` shortens them to a row.
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
# The number of conversations that are tokenized at once.
_BATCH_SIZE = 256
# Seconds between two lines of progress.
_PROGRESS_INTERVAL = 3.0


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template with its settings; it turns conversations into ids.

  Attributes:
    tokenizer: a fast Hugging Face tokenizer.
    source: Jinja source; '' for the tokenizer's own template.
    train_on: 'answers' or 'all'.
    system_prompt: the system turn of conversations that have none.
    date: the date that the template writes instead of today's, such as
      '2024-07-26'; '' for today's. See `template.fix_date`.

  Raises:
    ValueError: there is no template, its output is random, or `train_on` is
      not in `TRAIN_ON`.
  """

  tokenizer: Any
  source: str = ''
  train_on: str = 'answers'
  system_prompt: str = ''
  date: str = ''

  def __post_init__(self):
    if self.train_on not in TRAIN_ON:
      raise ValueError(
        f'config.data.train_on is one of {", ".join(TRAIN_ON)}; got '
        f'{self.train_on!r}'
      )
    if not self.source and not self.tokenizer.chat_template:
      raise ValueError(
        'the tokenizer has no chat template; name a Jinja file with '
        'config.data.chat_template'
      )
    chat_template.check_deterministic(self._joined_source)

  def render(self, conversation: Conversation) -> RenderedChat:
    """Renders a conversation; see `render.render_chat`.

    Raises:
      BadRow: the template cannot render it, or leaves out part of it.
    """
    conversation = self._with_system(conversation)
    template_check.check_features(conversation, self._dropped_features)
    rendered = chat_render.render_chat(
      conversation, self.tokenizer, self.train_on, self._dated_source
    )
    chat_template.check_contents(
      rendered.text, (t.content for t in conversation.turns)
    )
    return rendered

  @functools.cached_property
  def warnings(self) -> tuple[str, ...]:
    """Warnings for the user; see `template_check.template_warnings`."""
    return template_check.template_warnings(self.tokenizer, self.source)

  @functools.cached_property
  def _dropped_features(self) -> frozenset[str]:
    return template_check.dropped_features(self.tokenizer, self.source)

  @property
  def _joined_source(self) -> str:
    return chat_render.template_source(self.tokenizer, self.source)

  @functools.cached_property
  def _dated_source(self) -> str:
    """`source` with `date` in place of calls for today's date."""
    if not self.date or not chat_template.reads_clock(self._joined_source):
      return self.source
    template = self.source or self.tokenizer.chat_template
    if not isinstance(template, str):
      raise ValueError(
        'the tokenizer has several chat templates and one of them asks for '
        'the date; name one with config.data.chat_template'
      )
    return chat_template.fix_date(template, self.date)

  def encode_batch(self, chats: Sequence[RenderedChat]) -> list[Sample]:
    """Tokenizes rendered chats; see `tokenize.encode_chats`."""
    return tokenize.encode_chats(self.tokenizer, chats)

  def encode(self, conversation: Conversation) -> Sample:
    """Renders and tokenizes a conversation.

    Raises:
      BadRow: the template cannot render it, leaves out part of it, or rewrites
        turns so that its answers cannot be located.
    """
    (sample,) = self.encode_batch([self.render(conversation)])
    return sample

  def encode_prompt(self, conversation: Conversation) -> list[int]:
    """The ids of a conversation up to and including the generation prompt.

    Raises:
      BadRow: the template cannot render it.
    """
    conversation = self._with_system(conversation)
    text = chat_render.render_prompt(
      conversation, self.tokenizer, self._dated_source
    )
    return self.tokenizer(text, add_special_tokens=False)['input_ids']

  def eos_token_ids(self) -> list[int]:
    """The id of the special token that ends an answer; [] if there is none."""
    conversation = Conversation((Turn('user', 'a'), Turn('assistant', 'b')))
    try:
      sample = self.encode(conversation)
    except BadRow:
      # A template that needs other turns; a request gets its own error.
      return []
    last_ids = sample.ids[sample.loss_mask][-1:].tolist()
    return [i for i in last_ids if i in tokenize.special_ids(self.tokenizer)]

  def _with_system(self, conversation: Conversation) -> Conversation:
    if not self.system_prompt or conversation.turns[0].role == 'system':
      return conversation
    turns = (Turn('system', self.system_prompt), *conversation.turns)
    return dataclasses.replace(conversation, turns=turns)


def load_chat_template(data: ConfigDict, tokenizer: Tokenizer) -> ChatTemplate:
  """The chat template of `config.data`.

  Raises:
    ValueError: there is none, or the tokenizer is no Hugging Face tokenizer.
  """
  if not isinstance(tokenizer, HuggingFaceTokenizer):
    raise ValueError(
      f'conversations need a tokenizer with a chat template, got {tokenizer}; '
      'set config.data.tokenizer'
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
  """A tokenized conversation that fits a row.

  Attributes:
    sample: the ids and the loss mask.
    group: the contents of the turns up to the first question. The
      train/validation split is by group.
  """

  sample: Sample
  group: tuple[str, ...]


def read_chats(
  data: ConfigDict, tokenizer: Tokenizer, max_length: int = 0
) -> tuple[dict[str, list[ChatExample]], tuple[str, ...]]:
  """Reads and tokenizes the conversations of `data.path`.

  Args:
    max_length: the most tokens of a row; 0 for config.data.length.

  Returns:
    ({file: its conversations that fit a row}, lines for the user).

  Raises:
    ValueError: a row is bad, or no conversation is left.
  """
  template = load_chat_template(data, tokenizer)
  bad_rows = BadRows(data.on_bad_row, data.ignore_fields)
  chats: dict[str, list[ChatExample]] = {}
  num_truncated = num_dropped = 0
  rows = _with_progress(chat_formats.read_rows(data.path, bad_rows), data.path)
  while batch := list(itertools.islice(rows, _BATCH_SIZE)):
    for file, chat in _tokenize_rows(
      batch, template, data, bad_rows, max_length or data.length
    ):
      if chat is None:
        num_dropped += 1
        continue
      num_truncated += chat.sample.cut
      chats.setdefault(file, []).append(chat)
  num_chats = sum(map(len, chats.values()))
  notes = _notes(data, bad_rows, num_chats, num_truncated, num_dropped)
  return chats, (*notes, *template.warnings)


def _tokenize_rows(
  rows: Sequence[tuple[str, str, dict]],
  template: ChatTemplate,
  data: ConfigDict,
  bad_rows: BadRows,
  max_length: int,
) -> Iterator[tuple[str, ChatExample | None]]:
  """(file, example) of each good row; the example is None if it is dropped."""
  conversations, rendered = [], []
  for file, location, row in rows:
    try:
      conversation = chat_formats.check_answered(
        chat_formats.parse_conversation(row, data.format, bad_rows.unused)
      )
      rendered.append(template.render(conversation))
      conversations.append((file, location, conversation))
    except BadRow as e:
      bad_rows(location, e)
  for (file, location, conversation), sample in zip(
    conversations, template.encode_batch(rendered), strict=True
  ):
    try:
      # n inputs and n targets come from n + 1 ids.
      example = _make_example(
        conversation, sample, template, data.truncation, max_length + 1
      )
      yield file, example
    except BadRow as e:
      bad_rows(location, e)


def _make_example(
  conversation: Conversation,
  sample: Sample,
  template: ChatTemplate,
  truncation: str,
  max_ids: int,
) -> ChatExample | None:
  """The example of a conversation, truncated to `max_ids`; None if dropped."""
  if not sample.has_targets:
    raise BadRow('the row has no trained token; mend or remove the row')
  if len(sample.ids) > max_ids:
    sample = truncate_chat(conversation, template.encode, max_ids, truncation)
  first = next(i for i, t in enumerate(conversation.turns) if t.role == 'user')
  group = tuple(turn.content for turn in conversation.turns[: first + 1])
  return sample and ChatExample(sample, group)


def _with_progress(rows: Iterable, path: str) -> Iterator:
  """Yields the rows, and prints the number of rows read at intervals."""
  last_report, has_reported = time.monotonic(), False
  for count, row in enumerate(rows):
    if time.monotonic() - last_report > _PROGRESS_INTERVAL:
      print(f'\r{path}: {count:,} rows read', end='', file=sys.stderr)
      last_report, has_reported = time.monotonic(), True
    yield row
  if has_reported:
    print(file=sys.stderr)


def _notes(
  data: ConfigDict,
  bad_rows: BadRows,
  num_chats: int,
  num_truncated: int,
  num_dropped: int,
) -> list[str]:
  """Lines for the user on the rows that were read, truncated and dropped.

  Raises:
    ValueError: no conversation is left.
  """
  lines = [f'{data.path}: {num_chats:,} conversations']
  if bad_rows.reasons:
    lines.append(
      f'skipped {len(bad_rows.reasons):,} bad rows of {data.path}, the first: '
      f'{bad_rows.reasons[0]}'
    )
  if num_truncated:
    lines.append(
      f'{num_truncated:,} conversations are longer than config.data.length='
      f'{data.length} and are truncated '
      f'(config.data.truncation={data.truncation!r})'
    )
  if num_dropped:
    lacks_room = (
      ' and no room for the last answer' if data.truncation == 'prompt' else ''
    )
    lines.append(
      f'{num_dropped:,} conversations are dropped: longer than '
      f'config.data.length={data.length}, with '
      f'config.data.truncation={data.truncation!r}{lacks_room}'
    )
  if not num_chats and len(lines) == 1:
    raise ValueError(f'{data.path} is empty; expected conversations in it')
  lines += bad_rows.notes(data.path)
  if not num_chats:
    raise ValueError(
      f'{data.path} leaves no conversation to train on'
      + ''.join(f'; {line}' for line in lines[1:])
    )
  return lines
