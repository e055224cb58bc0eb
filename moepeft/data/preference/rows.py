# SPDX-License-Identifier: Apache-2.0
"""Reading of rows of compared and of judged answers."""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from moepeft.data.batching import collators, decoder_only
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat.formats import Turn
from moepeft.data.example import BadRow, BadRows
from moepeft.data.preference import formats as preference_formats
from moepeft.data.preference import tokenize as preference_tokenize
from moepeft.data.preference.formats import ComparedRow, JudgedRow
from moepeft.data.preference.tokenize import EncodedAnswers
from moepeft.data.readers import dataset_rows


def rows(
  data: ConfigDict,
  bad: BadRows,
  judged: bool,
  encode: preference_tokenize.Encode,
) -> tuple[list, list[EncodedAnswers], list[str]]:
  """(rows of the one kind, the same as ids, where each stands); those of no
  use are bad ones."""
  table, where = dataset_rows.open_table(data.path, data.split, bad)
  good, parts, places, nulls = (
    [],
    [],
    [],
    dataset_rows.fills_missing_fields(table),
  )
  for i, fields in enumerate(table):
    try:
      fields = dataset_rows.without_nulls(fields) if nulls else fields
      row = preference_formats.parse_row(fields, data.format, i, bad.unused)
      parsed = _useful(row, judged, data.system_prompt)
      ids = [encode(row.prompt, row.answers) for row in parsed]
      good.extend(parsed)
      parts.extend(ids)
      places.extend([where(i)] * len(parsed))
    except BadRow as e:
      bad(where(i), e)
  if not good:
    first = f', the first: {bad.reasons[0]}' if bad.reasons else ''
    raise ValueError(f'{data.path} holds no good row{first}')
  return good, parts, places


def _useful(row: ComparedRow | JudgedRow, judged: bool, system: str) -> list:
  """A row as the objective takes it, with a system's turn where it has none."""
  if isinstance(row, JudgedRow) and not judged:
    raise BadRow(
      'one answer with a label, but the objective compares two; set '
      "config.objective to 'kto'"
    )
  if system and row.prompt.turns[0].role != 'system':
    turns = (Turn('system', system), *row.prompt.turns)
    prompt = dataclasses.replace(row.prompt, turns=turns)
    row = dataclasses.replace(row, prompt=prompt)
  pair = isinstance(row, ComparedRow) and judged
  return list(preference_formats.unpaired(row)) if pair else [row]


def notes(
  data: ConfigDict,
  places: Sequence[str],
  spans: Sequence,
  alike: Sequence[str],
  bad: BadRows,
  collator: collators.Collator,
) -> tuple[str, ...]:
  """Lines for the user on the rows that were read, cut and left out.

  Args:
    places: where each row stands; spans: of `answer_ids.span`, None of rows
      that are left out: at `alike` as both answers are the same.
  """
  lines = [f'{data.path}: {len(places):,} rows']
  lines += [f'skipped {reason}' for reason in bad.reasons[:1]]
  decoder = isinstance(collator, decoder_only.CausalCollator)
  if decoder and not (
    data.chat_template
    or preference_tokenize.has_chat_template(collator.tokenizer)
  ):
    lines.append(
      f'{collator.tokenizer} brings no chat template: turns are written as '
      'plain text'
    )
  elif decoder:
    lines += chat_dataset.load_chat_template(data, collator.tokenizer).warnings
  if len(bad.reasons) > 1:
    lines.append(f'skipped {len(bad.reasons) - 1:,} bad rows more')
  pairs, same_answers = list(zip(places, spans, strict=True)), set(alike)
  left = [
    place for place, span in pairs if span is None and place not in same_answers
  ]
  cut = [place for place, span in pairs if span is not None and span.cut]
  for affected, description in (
    (left, 'left out, as they do not fit'),
    (cut, 'cut'),
  ):
    if affected:
      lines.append(
        f'{len(affected):,} of {len(places):,} rows of {data.path} are '
        f'{description} (the first: {affected[0]}); raise '
        f'{collator.length_keys} to keep them whole'
      )
  lines += bad.notes(data.path)
  if alike:
    lines.append(
      f'{len(alike):,} of {len(places):,} rows of {data.path} are left out, as '
      'their answers are the same to the tokenizer, or after they are cut (the '
      f'first: {alike[0]})'
    )
  return tuple(lines)
