# SPDX-License-Identifier: Apache-2.0
"""Compared and judged answers as batches with several sides."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from moepeft.data import answer_ids, causal, forms, hub, jsonl, preference
from moepeft.data.answer_ids import Parts
from moepeft.data.causal import Sample
from moepeft.data.conversations import Turn
from moepeft.data.preference import Compared, Judged
from moepeft.data.rows import Bad, BadRow
from moepeft.data.vocabulary import Vocabulary
from moepeft.objectives import COMPARED
from moepeft.objectives.sides import PAIR

SOURCE = 'preference'
# Of an answer that is judged, and of one to another prompt.
JUDGED = ('', 'kl_')


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
  data: ConfigDict, form: forms.Form, render: answer_ids.Render | None = None
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
  encode = answer_ids.encoder(data, own, render)
  rows, parts, places = _rows(data, bad, judged, encode)
  spans = [answer_ids.span(one, own, data.too_long) for one in parts]
  spans, alike = answer_ids.told_apart(parts, spans, places)
  kept = [i for i, span in enumerate(spans) if span is not None]
  if alike and not kept:
    raise ValueError(
      f'no row of {data.path} compares answers that differ to the tokenizer '
      f'within {own.longer} (the first: {alike[0]}); mend the rows, or raise '
      'the length'
    )
  if not kept:
    raise ValueError(
      f'none of {len(rows)} rows of {data.path} fits {own.longer} with '
      f'config.data.too_long={data.too_long!r} (the first: {places[0]}); raise '
      'the length'
    )
  mixed = [rows[i] for i in kept] if judged else []
  others = preference.mismatched(mixed, data.path)
  items = []
  for place, i in enumerate(kept):
    prompt, cap = spans[i].prompt, spans[i].cap
    sides = [
      answer_ids.side(prompt, answer, cap, own) for answer in parts[i].answers
    ]
    if judged:
      other = parts[kept[others[place]]].answers[0]
      sides.append(answer_ids.side(prompt, other, spans[i].room, own))
    label = rows[i].label if judged else None
    items.append(Item(tuple(sides), label, rows[i].idx, place))
  return Read(tuple(items), _notes(data, places, spans, alike, bad, own))


def _rows(
  data: ConfigDict, bad: Bad, judged: bool, encode: answer_ids.Encode
) -> tuple[list, list[Parts], list[str]]:
  """(rows of the one kind, the same as ids, where each stands); those of no
  use are bad ones."""
  table, where = hub.table_of(data.path, data.split, bad)
  rows, parts, places = [], [], []
  for i, fields in enumerate(table):
    try:
      found = _useful(preference.row(fields, data.form, i), judged, data.system)
      ids = [encode(row.prompt, row.answers) for row in found]
      rows.extend(found)
      parts.extend(ids)
      places.extend([where(i)] * len(found))
    except BadRow as e:
      bad(where(i), e)
  if not rows:
    first = f', the first: {bad.reasons[0]}' if bad.reasons else ''
    raise ValueError(f'{data.path} holds no good row{first}')
  return rows, parts, places


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


def _notes(
  data, places, spans, alike, bad: Bad, own: forms.Form
) -> tuple[str, ...]:
  notes = [f'skipped {reason}' for reason in bad.reasons[:1]]
  decoder = isinstance(own, causal.Samples)
  if decoder and not (data.chat_template or answer_ids.templated(own.words)):
    notes.append(
      f'{own.words} brings no chat template: turns are written as plain text'
    )
  if len(bad.reasons) > 1:
    notes.append(f'skipped {len(bad.reasons) - 1:,} bad rows more')
  pairs = list(zip(places, spans, strict=True))
  gone = set(alike)
  left = [place for place, span in pairs if span is None and place not in gone]
  cut = [place for place, span in pairs if span is not None and span.cut]
  for some, what in (
    (left, 'left out, as they do not fit'),
    (cut, 'cut'),
  ):
    if some:
      notes.append(
        f'{len(some):,} of {len(places):,} rows of {data.path} are {what} '
        f'(the first: {some[0]}); raise {own.longer} to keep them whole'
      )
  if alike:
    notes.append(
      f'{len(alike):,} of {len(places):,} rows of {data.path} are left out, as '
      'their answers are the same to the tokenizer, or after they are cut (the '
      f'first: {alike[0]})'
    )
  return tuple(notes)
