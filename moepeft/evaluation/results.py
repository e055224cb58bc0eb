# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation, with each example's score for paired comparisons.

A results file has one JSON object per line, for each task, prompt and metric.
"""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from moepeft.config import renamed
from moepeft.core import files, untrusted
from moepeft.core.ranges import suggestion
from moepeft.evaluation import bootstrap
from moepeft.metrics import METRICS, MetricInfo

HELD_OUT = 'held_out'
# Metrics of likelihoods; `METRICS` has the metrics of generated texts.
ACCURACY, LOSS = 'accuracy', 'loss'
_LIKELIHOOD_METRICS = {
  ACCURACY: MetricInfo(label='accuracy'),
  LOSS: MetricInfo(
    label='loss',
    unit='nats a token',
    factor=1.0,
    bounds=(0.0, math.inf),
    decimals=4,
    larger_is_better=False,
  ),
}


def metric_names() -> tuple[str, ...]:
  """Accuracy, loss, and the metrics of generated texts."""
  return (*_LIKELIHOOD_METRICS, *METRICS)


def metric_info(name: str) -> MetricInfo:
  """Looks up a metric by its name.

  Raises:
    ValueError: there is no such metric; the message lists all names.
  """
  if name in _LIKELIHOOD_METRICS:
    return _LIKELIHOOD_METRICS[name]
  if name not in METRICS:
    names = metric_names()
    raise ValueError(
      f'there is no metric {name!r}; there are '
      f'{", ".join(names)}{suggestion(name, names)}'
    )
  return METRICS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalInfo:
  """Facts that all results of one evaluation share.

  Attributes:
    run: the work directory, as it was given.
    method: the method string, 'none' for the base model without adapter.
    semantics: 'official' or 'paper'.
    base: the base model's name.
    base_parameters, parameters: numbers of the base's and of trained
      parameters.
    seed, step: the run's seed and the checkpoint's step.
    data: the rows' file or directory, 'held_out' for the run's held-out rows.
    data_sha: the first 12 hexadecimal digits of the SHA-256 of that data.
    inputs_length, targets_length: maximum tokens of a text, EOS included.
    checkpoint: 'latest', 'best', 'base' or a step, as it was given.

  The last four are None in results of older versions.
  """

  run: str
  method: str
  semantics: str
  base: str
  base_parameters: int
  parameters: int
  seed: int
  step: int
  data: str
  data_sha: str | None = None
  inputs_length: int | None = None
  targets_length: int | None = None
  checkpoint: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
  """The value of one metric on the examples of one prompt.

  Attributes:
    value: sum(each) / sum(weights), or a corpus metric's score.
    examples: the number of examples, n.
    chance, majority: the accuracy of guessing, and of always predicting the
      most frequent label; None for other metrics.
    cut: the number of examples whose text was truncated.
    left_out: the number of further examples, which could not be ranked.
    idx: [n], the `idx` of each example.
    each: [n], each example's score: 1 or 0, or nats; None for a corpus metric.
    weights: [n], each example's weight: 1, or its number of target tokens;
      None for a corpus metric.
  """

  task: str
  prompt: str
  metric: str
  value: float
  examples: int
  chance: float | None = None
  majority: float | None = None
  cut: int = 0
  left_out: int = 0
  idx: tuple[int, ...]
  each: tuple[float, ...] | None
  weights: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Measurement, EvalInfo):
  """A line of a results file.

  Attributes:
    low, high: the value's 95 % bootstrap interval over examples, or None.
  """

  low: float | None
  high: float | None


def measurement(
  task: str,
  prompt: str,
  metric: str,
  idx: Sequence[int],
  each: Sequence[float] | None,
  weights: Sequence[float] | None = None,
  *,
  value: float | None = None,
  chance: float | None = None,
  majority: float | None = None,
  cut: int = 0,
  left_out: int = 0,
) -> Measurement:
  """Makes a measurement of the scores of its examples.

  Args:
    idx: [n], the `idx` of each example.
    each: [n], each example's score; None if `value` is a corpus metric's score.
    weights: [n]; by default 1 each.

  Raises:
    ValueError: the value is not finite.
  """
  if each is not None:
    weights = (1,) * len(idx) if weights is None else weights
    value = float(np.sum(each) / np.sum(weights))
  if value is None or not math.isfinite(value):
    raise ValueError(
      f'{metric} of {task!r}, prompt {prompt!r}, is {value}, no finite '
      'number; see whether the run has diverged'
    )
  return Measurement(
    task=task,
    prompt=prompt,
    metric=metric,
    value=value,
    examples=len(idx),
    chance=chance,
    majority=majority,
    cut=cut,
    left_out=left_out,
    idx=_as_tuple(idx),
    each=_as_tuple(each),
    weights=_as_tuple(weights),
  )


def make_result(info: EvalInfo, measured: Measurement) -> Result:
  """Adds a confidence interval and the evaluation's facts to a measurement."""
  low = high = None
  if measured.each is not None:
    table = bootstrap.table([measured.idx], [measured.each], [measured.weights])
    if len(table[0]) > 1:
      draws = bootstrap.means(*table, measured.task)[:, 0]
      low, high = bootstrap.interval(draws)
  return Result(**vars(info), **vars(measured), low=low, high=high)


def majority(labels: Sequence[int]) -> float:
  """The share of the most frequent label."""
  return max(collections.Counter(labels).values()) / len(labels)


def write(path: str, results: Iterable[Result]) -> None:
  """Writes a results file atomically.

  Raises:
    OSError: the file cannot be written; its old content is unchanged.
  """
  files.write_text(path, ''.join(map(_to_json, results)))


def read(path: str) -> list[Result]:
  """Reads all results of a file.

  Raises:
    ValueError: there is no file, it is empty, or a line is not a result.
  """
  if not os.path.exists(path):
    raise ValueError(
      f'{path!r} does not exist; make it with python -m moepeft.evaluate'
    )
  with files.open_file(path, 'r') as lines:
    try:
      results = [_parse(line, path, i) for i, line in enumerate(lines, 1)]
    except UnicodeDecodeError:
      raise ValueError(
        f'{path} is no text; expected the results of python -m moepeft.evaluate'
      ) from None
  if not results:
    raise ValueError(
      f'{path} holds no results; make it again with python -m moepeft.evaluate'
    )
  return results


def _as_tuple(values: Sequence[float] | None) -> tuple | None:
  """NumPy arrays and numbers as a tuple of Python numbers."""
  return None if values is None else tuple(np.asarray(values).tolist())


def _to_json(result: Result) -> str:
  return json.dumps(vars(result), allow_nan=False, ensure_ascii=False) + '\n'


def _parse(line: str, path: str, number: int) -> Result:
  try:
    fields = untrusted.parse_json(line, allow_nan=False)
    if isinstance(fields, dict) and 'measure' in fields:
      # The name of the field in files of versions before 0.2.
      fields['metric'] = fields.pop('measure')
    error = _find_error(fields)
  except untrusted.Malformed as e:
    error = str(e)
  if error:
    raise ValueError(
      f'line {number} of {path} is no result of an evaluation: {error}; make '
      'the file again with python -m moepeft.evaluate'
    )
  arrays = {
    key: fields[key] and tuple(fields[key])
    for key in ('idx', 'each', 'weights')
  }
  method = renamed.translate_method(fields['method'])
  return Result(**fields | arrays | {'method': method})


_TEXT_FIELDS = ('run', 'method', 'semantics', 'base', 'data', 'task', 'prompt')
_INT_FIELDS = (
  'base_parameters',
  'parameters',
  'seed',
  'step',
  'examples',
  'cut',
  'left_out',
)
_OPTIONAL_FIELDS = ('low', 'high', 'chance', 'majority')
# Fields that results of older versions lack.
_NEWER_FIELDS = {
  'data_sha': str,
  'inputs_length': int,
  'targets_length': int,
  'checkpoint': str,
}


def _find_error(fields) -> str:
  """A description of the first error of a line; '' if there is none."""
  if not isinstance(fields, dict):
    return 'expected a JSON object'
  names = {field.name for field in dataclasses.fields(Result)}
  missing, unknown = (
    names - fields.keys() - _NEWER_FIELDS.keys(),
    fields.keys() - names,
  )
  if missing or unknown:
    return f'it lacks {sorted(missing)}, and has the unknown {sorted(unknown)}'
  for key in _TEXT_FIELDS:
    if not isinstance(fields[key], str):
      return f'expected text in {key!r}, got {fields[key]!r}'
  for key in _INT_FIELDS:
    if type(fields[key]) is not int or not _is_number(fields[key]):
      return f'expected a whole number in {key!r}, got {fields[key]!r}'
  for key, kind in _NEWER_FIELDS.items():
    if fields.get(key) is not None and type(fields[key]) is not kind:
      return f'expected {kind.__name__} or null in {key!r}, got {fields[key]!r}'
  for key in ('value', *_OPTIONAL_FIELDS):
    number = fields[key]
    if not _is_number(number) and (number is not None or key == 'value'):
      return f'expected a number in {key!r}, got {number!r}'
  if fields['metric'] not in metric_names():
    return (
      f'the metric is one of {", ".join(metric_names())}, got '
      f'{fields["metric"]!r} (the module of another is named with --imports)'
    )
  return _find_array_error(fields)


def _find_array_error(fields: dict) -> str:
  if (fields['each'] is None) != (fields['weights'] is None):
    return "one of 'each' and 'weights' is null, and the other is not"
  for key in ('idx', 'each', 'weights'):
    values = fields[key]
    if values is None and key != 'idx':
      continue
    if not isinstance(values, list) or not all(map(_is_number, values)):
      return f'expected a list of numbers in {key!r}'
    if len(values) != fields['examples']:
      return (
        f'{key!r} has {len(values)} entries for {fields["examples"]} examples'
      )
  return '' if fields['examples'] > 0 else "'examples' is at least 1"


def _is_number(value) -> bool:
  # Larger integers of JSON overflow float64 or int64 arrays.
  if type(value) is int:
    return abs(value) < 2**63
  return type(value) is float and math.isfinite(value)
