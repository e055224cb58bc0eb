# SPDX-License-Identifier: Apache-2.0
"""Rows of compared and of judged answers, read and told of."""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from moepeft.data import answer_ids, causal, forms, hub, preference
from moepeft.data.answer_ids import Parts
from moepeft.data.conversations import Turn
from moepeft.data.preference import Compared, Judged
from moepeft.data.rows import Bad, BadRow


def rows(
  data: ConfigDict, bad: Bad, judged: bool, encode: answer_ids.Encode
) -> tuple[list, list[Parts]]:
  """(rows of the one kind, the same as ids); those of no use are bad ones."""
  table, where = hub.table_of(data.path, data.split, bad)
  good, parts = [], []
  for i, fields in enumerate(table):
    try:
      found = _useful(preference.row(fields, data.form, i), judged, data.system)
      ids = [encode(row.prompt, row.answers) for row in found]
      good.extend(found)
      parts.extend(ids)
    except BadRow as e:
      bad(where(i), e)
  if not good:
    first = f', the first: {bad.reasons[0]}' if bad.reasons else ''
    raise ValueError(f'{data.path} holds no good row{first}')
  return good, parts


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


def mismatched(rows: Sequence[Judged], path: str) -> list[int]:
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


def notes(
  data: ConfigDict, spans: list, alike: int, bad: Bad, own: forms.Form
) -> tuple[str, ...]:
  """What became of the rows, in lines for the user.

  Args:
    spans: of `answer_ids.span`, None of rows that are left out: `alike` of
      them as both answers are the same.
  """
  lines = [f'skipped {reason}' for reason in bad.reasons[:1]]
  decoder = isinstance(own, causal.Samples)
  if decoder and not (data.chat_template or answer_ids.templated(own.words)):
    lines.append(
      f'{own.words} brings no chat template: turns are written as plain text'
    )
  if len(bad.reasons) > 1:
    lines.append(f'skipped {len(bad.reasons) - 1:,} bad rows more')
  left = sum(span is None for span in spans) - alike
  cut = sum(span is not None and span.cut for span in spans)
  for count, what in (
    (left, 'left out, as an answer does not fit'),
    (alike, 'left out, as both answers are the same in what fits'),
    (cut, 'cut'),
  ):
    if count:
      lines.append(
        f'{count:,} of {len(spans):,} rows of {data.path} are {what}; raise '
        f'{own.longer} to keep them whole'
      )
  return tuple(lines)
