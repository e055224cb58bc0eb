# SPDX-License-Identifier: Apache-2.0
"""Reads problems with their optimal values: public benchmarks and our own.

  keys                        benchmarks
  en_question, en_answer      NL4OPT, MAMO and IndustryOR as ORLM publishes them
  Question, Answer            MAMO's own files
  question, answer            others
  text, value                 rows of examples/or_agents/generate.py
  description.txt and         ComplexOR: a folder for each problem, whose
  sample.json                 samples are its inputs with their values

Files have a JSON object a line, or one list of objects. Answers are numbers or
their text; 'No Best Solution', -99999 and null are for problems without an
optimum. NL4OPT's own files have no optimal values, so they cannot be read.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moepeft.agent.flags import read_input
from moepeft.core import files
from moepeft.core.untrusted import Malformed, parse_json, read_json

_KEYS = (
  ('en_question', 'en_answer'),
  ('Question', 'Answer'),
  ('question', 'answer'),
  ('text', 'value'),
)
_NO_OPTIMUM = ('no best solution', 'infeasible', 'unbounded')
_NO_OPTIMUM_VALUE = -99999


@dataclasses.dataclass(frozen=True)
class Row:
  """A problem of a benchmark.

  Attributes:
    name: its id, or its place in the file.
    text: the problem in words.
    value: the optimal value; None if the problem has none.
  """

  name: str
  text: str
  value: float | None


def read_rows(path: str | os.PathLike) -> list[Row]:
  """Reads a file of rows, or a folder in ComplexOR's form.

  Raises:
    ValueError: the file cannot be read, or a row has no known form.
    OSError: a file of the folder cannot be read.
  """
  path = Path(path)
  rows = list(_folder_rows(path) if path.is_dir() else _file_rows(path))
  if not rows:
    raise ValueError(f'{path} has no problem; expected at least one')
  return rows


def _file_rows(path: Path) -> Iterator[Row]:
  text = read_input(str(path), 'rows of a benchmark')
  if text.lstrip().startswith('['):
    sources = [
      (f'entry {i}', source) for i, source in enumerate(read_json(path), 1)
    ]
  else:
    sources = []
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        try:
          sources.append((f'line {number}', parse_json(line)))
        except Malformed as e:
          raise ValueError(f'line {number} of {path} is {e}') from None
  for where, source in sources:
    try:
      yield _row(source, where)
    except Malformed as e:
      raise ValueError(f'{where} of {path}: {e}') from None


def _row(source: Any, where: str) -> Row:
  if not isinstance(source, Mapping):
    raise Malformed('it is not a JSON object')
  for question, answer in _KEYS:
    text = source.get(question)
    if isinstance(text, str) and text.strip() and answer in source:
      name = str(source.get('id', where))
      return Row(name, text.strip(), _value(source[answer]))
  pairs = ', '.join('/'.join(pair) for pair in _KEYS)
  raise Malformed(f'it has no question and answer; expected the keys {pairs}')


def _value(answer: Any) -> float | None:
  """The optimal value of an answer; None for a problem without one."""
  if answer is None or str(answer).strip().lower() in _NO_OPTIMUM:
    return None
  try:
    value = float(answer)
  except (TypeError, ValueError):
    value = math.nan
  if not math.isfinite(value):
    raise Malformed(f'its answer is not a number: {answer!r:.80}')
  return None if value == _NO_OPTIMUM_VALUE else value


def _folder_rows(path: Path) -> Iterator[Row]:
  """Rows of ComplexOR: a description, then the numbers of a sample."""
  for folder in sorted(p.parent for p in path.glob('*/description.txt')):
    text = files.read_text(folder / 'description.txt').strip()
    samples = read_json(folder / 'sample.json')
    try:
      for i, sample in enumerate(samples, 1):
        inputs = json.dumps(sample['input'], ensure_ascii=False)
        (answer,) = sample['output']
        name = f'{folder.name}/{i}'
        yield Row(name, f'{text}\n\nData: {inputs}', _value(answer))
    except (Malformed, LookupError, TypeError, ValueError) as e:
      raise ValueError(
        f'{folder / "sample.json"} is no list of samples with "input" and one '
        f'number in "output": {e}'
      ) from None
