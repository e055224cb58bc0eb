# SPDX-License-Identifier: Apache-2.0
"""Compared and judged answers as ids, and as batches with several sides.

A pair's prompt is the same on both sides and never trained. What is too long
costs the prompt its beginning, or the row: no answer is cut beside one that is
whole.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from moepeft.data import causal, chat, forms, hub, jsonl, preference
from moepeft.data.causal import Sample
from moepeft.data.conversations import Conversation, Turn
from moepeft.data.preference import Compared, Judged
from moepeft.data.rows import Bad, BadRow
from moepeft.data.vocabulary import Tokenizer, Vocabulary
from moepeft.objectives import COMPARED
from moepeft.objectives.sides import PAIR

SOURCE = 'preference'
# Of an answer that is judged, and of one to another prompt.
JUDGED = ('', 'kl_')
# The share of a decoder's row that a prompt keeps beside long answers.
_LEAST = 4

# A conversation as ids, of which the last run of trained tokens is the answer.
Render = Callable[[Conversation], Sample]
# (prompt, answers) -> Parts
Encode = Callable[[Conversation, Sequence[Turn]], 'Parts']


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
  """A row as ids.

  Attributes:
    sides: what the model's own form holds of each answer with its prompt.
    label: whether a judged answer is a good one; None of a pair.
    idx, task: by which rows are held out.
    place: of the row among all of its source.
    references: float32 [k, t], log p of each target of each side, where it
      was computed before training.
  """

  sides: tuple
  label: bool | None
  idx: int
  place: int
  task: str = ''
  references: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Sides:
  """The form of batches with several sides; see `moepeft.data.forms`.

  Attributes:
    own: the form of one side.
    judged: whether answers are judged one by one, not compared.
  """

  own: forms.Form
  judged: bool
  packed: ClassVar[bool] = False

  @property
  def words(self) -> Vocabulary:
    return self.own.words

  @property
  def sides(self) -> tuple[str, str]:
    """What the keys of its batches begin with."""
    return JUDGED if self.judged else PAIR

  def encode(self, items: Sequence[Item]) -> list[Item]:
    """What `items` has made, as it is."""
    return list(items)

  def rows(self, number: int, encoded: Sequence[Item]) -> forms.Rows:
    del number
    return self.padded(encoded)

  def padded(self, encoded: Sequence[Item]) -> forms.Rows:
    """A batch of each side, its keys after the side's name.

    Returns:
      'chosen_inputs', ..., 'rejected_inputs', ... of pairs; 'inputs', ...,
      'kl_inputs', ... and 'label' bool [b] of judged answers; and
      'chosen_reference' ('reference' of judged ones) and its like, float32
      [b, t], where the items have them.
    """
    found = {}
    for i, side in enumerate(self.sides):
      rows = self.own.padded([item.sides[i] for item in encoded])
      found |= {f'{side}{key}': array for key, array in rows.items()}
      if encoded[0].references is not None:
        given = np.stack([item.references[i] for item in encoded])
        found[f'{side}reference'] = given
    if self.judged:
      found['label'] = np.array([item.label for item in encoded])
    return found

  def cut(self, items: Sequence[Item]) -> int:
    """0: what was too long was told when the rows were read."""
    del items
    return 0

  @property
  def longer(self) -> str:
    return self.own.longer

  @property
  def lengths(self) -> tuple[int, ...]:
    return self.own.lengths

  def resized(self, lengths: tuple[int, ...]) -> 'Sides':
    return dataclasses.replace(self, own=self.own.resized(lengths))

  def sizes(self, encoded: Sequence[Item]):
    """Of each row's longest side, and its trained tokens of all sides."""
    places, trained = [], []
    for item in encoded:
      own, tokens = self.own.sizes(item.sides)
      places.append(tuple(map(max, zip(*own, strict=True))))
      trained.append(sum(tokens))
    return places, trained


@dataclasses.dataclass(frozen=True)
class Read:
  """What a source of preferences holds.

  Attributes:
    items: rows that fit, in the source's order.
    notes: lines for the user.
  """

  items: tuple[Item, ...]
  notes: tuple[str, ...]

  @property
  def sha256(self) -> str:
    """Of every id and what is trained of it, in order."""
    found = hashlib.sha256()
    for item in self.items:
      for side in item.sides:
        one = vars(side).values() if isinstance(side, Sample) else side
        for part in one:
          array = np.asarray(part, np.int32)
          found.update(np.int64(array.size).tobytes() + array.tobytes())
    return found.hexdigest()

  def with_references(self, references: np.ndarray) -> 'Read':
    """The same items with theirs of float32 [items, k, t]."""
    items = (
      dataclasses.replace(item, references=references[i])
      for i, item in enumerate(self.items)
    )
    return dataclasses.replace(self, items=tuple(items))

  def split(self, held_out: float) -> tuple[list[Item], list[Item]]:
    """(training, validation), both answers to a prompt on one side."""
    return jsonl.split(self.items, held_out)


def form_of(data: ConfigDict, objective: str, own: forms.Form) -> forms.Form:
  """The form of an objective's batches.

  Args:
    objective: config.objective; own: the model's form.

  Raises:
    ValueError: the objective and config.data.source are not of one kind.
  """
  if (objective in COMPARED) != (data.source == SOURCE):
    raise ValueError(
      f'config.objective={objective!r} does not go with config.data.source='
      f'{data.source!r}: {", ".join(COMPARED)} are of the source {SOURCE!r}, '
      'and of no other; set one of the two'
    )
  return Sides(own, objective == 'kto') if objective in COMPARED else own


def read(
  data: ConfigDict, form: forms.Form, render: Render | None = None
) -> Read:
  """Reads config.data.path and makes ids of it.

  Args:
    form: of `form_of`; where answers are judged, pairs become two of them.
    render: of a decoder; by default the chat template, or plain text where
      the tokenizer has none.

  Raises:
    ValueError: no such file; a row that is not of the form (the message names
      the file and the row), or of no use to the objective; or none that fits.
  """
  if not isinstance(form, Sides):
    raise ValueError(
      f'rows of config.data.source={SOURCE!r} are for training with one of '
      f'{", ".join(COMPARED)}; name other rows to evaluate'
    )
  own, judged = form.own, form.judged
  if not data.path:
    raise ValueError(
      'set config.data.path to a .json or .jsonl file of preferences, or to a '
      'name on the hub'
    )
  if data.packing:
    raise ValueError(
      "config.data.packing does nothing with config.data.source='preference', "
      'whose rows have several sides; set it to False'
    )
  bad = Bad(data.on_bad_row)
  encode = _encoder(data, own, render)
  rows, parts = _rows(data, bad, judged, encode)
  spans = [_span(one, own, data.too_long) for one in parts]
  kept = [i for i, span in enumerate(spans) if span is not None]
  if not kept:
    raise ValueError(
      f'none of {len(rows)} rows of {data.path} fits {own.longer} with '
      f'config.data.too_long={data.too_long!r}; raise the length'
    )
  others = _mismatched([rows[i] for i in kept], data.path) if judged else ()
  items = []
  for place, i in enumerate(kept):
    prompt, cap = spans[i].prompt, spans[i].cap
    sides = [_side(prompt, answer, cap, own) for answer in parts[i].answers]
    if judged:
      other = parts[kept[others[place]]].answers[0]
      sides.append(_side(prompt, other, spans[i].room, own))
    label = rows[i].label if judged else None
    items.append(Item(tuple(sides), label, rows[i].idx, place))
  return Read(tuple(items), _notes(data, rows, spans, bad, own))


def _rows(
  data: ConfigDict, bad: Bad, judged: bool, encode: Encode
) -> tuple[list, list['Parts']]:
  """(rows of the one kind, the same as ids); those of no use are bad ones."""
  table, where = hub.table_of(data.path, data.split, bad)
  rows, parts = [], []
  for i, fields in enumerate(table):
    try:
      found = _useful(preference.row(fields, data.form, i), judged, data.system)
      ids = [encode(row.prompt, row.answers) for row in found]
      rows, parts = rows + found, parts + ids
    except BadRow as e:
      bad(where(i), e)
  if not rows:
    first = f', the first: {bad.reasons[0]}' if bad.reasons else ''
    raise ValueError(f'{data.path} holds no good row{first}')
  return rows, parts


def _useful(row: Compared | Judged, judged: bool, system: str) -> list:
  """A row as the objective takes it, with a system's turn where it has none."""
  if isinstance(row, Judged) and not judged:
    raise BadRow(
      'one answer with a label, but the objective compares two; set '
      "config.objective to 'kto'"
    )
  if system and row.prompt.turns[0].role != 'system':
    turns = (Turn('system', system), *row.prompt.turns)
    prompt = dataclasses.replace(row.prompt, turns=turns)
    row = dataclasses.replace(row, prompt=prompt)
  pair = isinstance(row, Compared) and judged
  return list(preference.unpaired(row)) if pair else [row]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """A row as ids, of any length: its prompt, and (ids, trained) of answers."""

  prompt: np.ndarray
  answers: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
  """What of a row fits.

  Attributes:
    prompt: what is left of it.
    cap: tokens of each answer that are kept, all of them unless both are cut.
    room: tokens that there are for an answer.
    cut: whether anything was cut.
  """

  prompt: np.ndarray
  cap: int
  room: int
  cut: bool


def _encoder(
  data: ConfigDict, own: forms.Form, render: Render | None
) -> Encode:
  """(prompt, answers) -> Parts."""
  if data.train_on != 'answers':
    raise ValueError(
      f'config.data.train_on={data.train_on!r} does nothing with '
      f'config.data.source={SOURCE!r}, whose prompts are never trained; set it '
      "to 'answers'"
    )
  if not isinstance(own, causal.Samples):
    words = own.words

    def both(prompt, answers) -> Parts:
      end = np.int32(words.eos)
      texts = [said(prompt), *(turn.content for turn in answers)]
      found = words.encode_all(texts)
      ids = [np.append(np.asarray(text, np.int32), end) for text in found]
      return Parts(ids[0], tuple((x, np.ones(len(x), bool)) for x in ids[1:]))

    return both
  render = render or renderer(data, own.words)

  def decoder(prompt, answers) -> Parts:
    prompts, found = [], []
    for answer in answers:
      turns = (*prompt.turns, answer)
      whole = render(dataclasses.replace(prompt, turns=turns))
      start = _last_run(whole.trained)
      prompts.append(whole.ids[:start])
      found.append((whole.ids[start:], whole.trained[start:]))
    if any(not np.array_equal(prompts[0], one) for one in prompts):
      raise BadRow(
        'the chat template makes another prompt of each answer; name one that '
        'does not with config.data.chat_template'
      )
    return Parts(prompts[0], tuple(found))

  return decoder


def _last_run(trained: np.ndarray) -> int:
  """Where the last run of trained tokens begins."""
  if not trained.any():
    raise BadRow('no token of the answer is trained; mend or remove the row')
  last = int(np.flatnonzero(trained)[-1])
  before = np.flatnonzero(~trained[:last])
  return int(before[-1]) + 1 if len(before) else 0


def renderer(data: ConfigDict, words: Vocabulary) -> Render:
  """The chat template, or plain text where the tokenizer has none.

  Raises:
    ValueError: config.data.chat_template cannot be read, or is for bytes.
  """
  if data.chat_template or templated(words):
    return chat.template(data, words).render

  def plain(whole: Conversation) -> Sample:
    prompt = dataclasses.replace(whole, turns=whole.turns[:-1])
    (asked,) = causal.prompts(words, [said(prompt)])
    (ids,) = causal.answers(words, [whole.turns[-1].content])
    return causal.sample(asked, ids)

  return plain


def templated(words: Vocabulary) -> bool:
  """Whether a vocabulary brings a chat template."""
  own = words.tokenizer if isinstance(words, Tokenizer) else None
  return bool(own is not None and own.chat_template)


def said(prompt: Conversation) -> str:
  """Turns as plain text: a single one as it is, several by their roles."""
  if len(prompt.turns) == 1:
    return prompt.turns[0].content
  return '\n'.join(f'{turn.role}: {turn.content}' for turn in prompt.turns)


def _span(parts: Parts, own: forms.Form, too_long: str) -> Span | None:
  """What of a row fits, None where it is left out."""
  prompt = parts.prompt
  lengths = [len(ids) for ids, _ in parts.answers]
  longest, both = max(lengths), min(lengths)
  if not isinstance(own, causal.Samples):
    most, room = own.lengths
    over = len(prompt) > most
    if over and too_long == 'drop':
      return None
    left = prompt[-most:] if too_long == 'prompt' else prompt[:most]
    if longest <= room:
      return Span(left, longest, room, over)
    cut = too_long == 'end' and both > room
    return Span(left, room, room, True) if cut else None
  # One token more than are fed.
  row = own.length + 1
  if len(prompt) + longest <= row:
    return Span(prompt, longest, row - len(prompt), False)
  if too_long == 'prompt':
    left = row - longest
    if left < min(len(prompt), row // _LEAST):
      return None
    return Span(prompt[-left:], longest, longest, True)
  room = row - len(prompt)
  # Both ends are cut or none.
  cut = too_long == 'end' and both > room >= 1
  return Span(prompt, room, room, True) if cut else None


def _side(prompt: np.ndarray, answer, cap: int, own: forms.Form):
  """What the form of one side holds."""
  ids, trained = (part[:cap] for part in answer)
  if not isinstance(own, causal.Samples):
    return prompt, ids
  untrained = np.zeros(len(prompt), bool)
  return Sample(
    np.concatenate([prompt, ids]).astype(np.int32),
    np.concatenate([untrained, trained]),
  )


def _mismatched(rows: Sequence[Judged], path: str) -> list[int]:
  """For each row the place of one with another prompt, always the same one.

  It may be a row that is held out: nothing is learnt of a mismatched answer.

  Raises:
    ValueError: all rows have one prompt.
  """
  count, found = len(rows), []
  for i, row in enumerate(rows):
    places = ((i + count // 2 + step) % count for step in range(count))
    other = next((j for j in places if rows[j].prompt != row.prompt), None)
    if other is None:
      raise ValueError(
        f'all {count} rows of {path} have the same prompt, but kto measures '
        'answers against those to other prompts; add rows'
      )
    found.append(other)
  return found


def _notes(data, rows, spans, bad: Bad, own: forms.Form) -> tuple[str, ...]:
  notes = [f'skipped {reason}' for reason in bad.reasons[:1]]
  decoder = isinstance(own, causal.Samples)
  if decoder and not (data.chat_template or templated(own.words)):
    notes.append(
      f'{own.words} brings no chat template: turns are written as plain text'
    )
  if len(bad.reasons) > 1:
    notes.append(f'skipped {len(bad.reasons) - 1:,} bad rows more')
  left = sum(span is None for span in spans)
  cut = sum(span is not None and span.cut for span in spans)
  for count, what in (
    (left, 'left out, as an answer does not fit'),
    (cut, 'cut'),
  ):
    if count:
      notes.append(
        f'{count:,} of {len(rows):,} rows of {data.path} are {what}; raise '
        f'{own.longer} to keep them whole'
      )
  return tuple(notes)
