# SPDX-License-Identifier: Apache-2.0
"""Reads rows of compared and of judged answers."""

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


def read_rows(
  data: ConfigDict,
  bad: BadRows,
  judged: bool,
  encode: preference_tokenize.Encode,
) -> tuple[list, list[EncodedAnswers], list[str]]:
  """(rows of the objective's kind, their ids, the file and line of each).

  Rows that the objective cannot use are bad rows.

  Raises:
    ValueError: there is no good row.
  """
  table, where = dataset_rows.open_table(data.path, data.split, bad)
  nulls = dataset_rows.fills_missing_fields(table)
  good, encoded, locations = [], [], []
  for i, fields in enumerate(table):
    try:
      fields = dataset_rows.without_nulls(fields) if nulls else fields
      row = preference_formats.parse_row(fields, data.format, i, bad.unused)
      parsed = _objective_rows(row, judged, data.system_prompt)
      answers = [encode(row.prompt, row.answers) for row in parsed]
      good.extend(parsed)
      encoded.extend(answers)
      locations.extend([where(i)] * len(parsed))
    except BadRow as e:
      bad(where(i), e)
  if not good:
    first = f', the first: {bad.reasons[0]}' if bad.reasons else ''
    raise ValueError(f'{data.path} holds no good row{first}')
  return good, encoded, locations


def _objective_rows(
  row: ComparedRow | JudgedRow, judged: bool, system: str
) -> list:
  """The rows that the objective reads of one row, with a system turn.

  Args:
    system: the content of the system turn of rows without one; '' for none.
  """
  if isinstance(row, JudgedRow) and not judged:
    raise BadRow(
      'one answer with a label, but the objective compares two; set '
      "config.objective to 'kto'"
    )
  if system and row.prompt.turns[0].role != 'system':
    turns = (Turn('system', system), *row.prompt.turns)
    prompt = dataclasses.replace(row.prompt, turns=turns)
    row = dataclasses.replace(row, prompt=prompt)
  if isinstance(row, ComparedRow) and judged:
    return list(preference_formats.split_pair(row))
  return [row]


def notes(
  data: ConfigDict,
  locations: Sequence[str],
  budgets: Sequence[preference_tokenize.AnswerBudget | None],
  equal_answers: Sequence[str],
  bad: BadRows,
  collator: collators.Collator,
) -> tuple[str, ...]:
  """Lines for the user on the rows that were read, cut and left out.

  Args:
    locations: the file and line of each row.
    budgets: each row's `tokenize.fit_answers`; None if it is left out.
    equal_answers: locations of rows that are left out as their answers have
      equal ids.
  """
  lines = [f'{data.path}: {len(locations):,} rows']
  lines += [f'skipped {reason}' for reason in bad.reasons[:1]]
  is_decoder = isinstance(collator, decoder_only.CausalCollator)
  if is_decoder and not (
    data.chat_template
    or preference_tokenize.has_chat_template(collator.tokenizer)
  ):
    lines.append(
      f'{collator.tokenizer} brings no chat template: turns are written as '
      'plain text'
    )
  elif is_decoder:
    lines += chat_dataset.load_chat_template(data, collator.tokenizer).warnings
  if len(bad.reasons) > 1:
    lines.append(f'skipped {len(bad.reasons) - 1:,} bad rows more')
  pairs = list(zip(locations, budgets, strict=True))
  left_out = [
    location
    for location, budget in pairs
    if budget is None and location not in set(equal_answers)
  ]
  cut = [
    location for location, budget in pairs if budget is not None and budget.cut
  ]
  for affected, description in (
    (left_out, 'left out, as they do not fit'),
    (cut, 'cut'),
  ):
    if affected:
      lines.append(
        f'{len(affected):,} of {len(locations):,} rows of {data.path} are '
        f'{description} (the first: {affected[0]}); raise '
        f'{collator.length_keys} to keep them whole'
      )
  lines += bad.notes(data.path)
  if equal_answers:
    lines.append(
      f'{len(equal_answers):,} of {len(locations):,} rows of {data.path} are '
      'left out, as their answers are the same to the tokenizer, or after they '
      f'are cut (the first: {equal_answers[0]})'
    )
  return tuple(lines)
