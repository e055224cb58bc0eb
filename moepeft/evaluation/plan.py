# SPDX-License-Identifier: Apache-2.0
"""Evaluation plans: each metric's prompts, and partial results on disk."""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from moepeft.data import TrainingData
from moepeft.evaluation import eval_sets
from moepeft.evaluation import results as results_lib
from moepeft.evaluation.eval_sets import PromptExamples
from moepeft.evaluation.results import (
  ACCURACY,
  LOSS,
  EvalInfo,
  Result,
  metric_info,
  metric_names,
)
from moepeft.inference.loaded_model import LoadedModel
from moepeft.metrics import METRICS
from moepeft.models import decoder_only
from moepeft.runs.metrics_log import MetricsLog
from moepeft.tasks import Example

# Metric name -> the prompts that it is computed on.
EvalPlan = dict[str, list[PromptExamples]]


def check_metrics(names: Sequence[str]) -> None:
  """
  Raises:
    ValueError: there is no metric of one of the names.
  """
  for name in names:
    metric_info(name)


def check_length(run: LoadedModel, names: Sequence[str]) -> None:
  """Checks that prompts and answers fit into a decoder's maximum length.

  Raises:
    ValueError: config.data.length exceeds it, and a metric generates text.
  """
  data, model = run.config.data, run.model
  text_metrics = [name for name in names if name in METRICS]
  if not decoder_only(model) or not text_metrics:
    return
  if data.length > model.config.length:
    raise ValueError(
      f'prompts and generated answers have config.data.length={data.length:,} '
      f'tokens in this run, and the model has room for '
      f'{model.config.length:,}; leave out {", ".join(text_metrics)}, or train '
      'with a lower length'
    )


def plan_from_rows(
  rows: Sequence[Example], names: Sequence[str], max_examples: int
) -> EvalPlan:
  """Makes the plan for the rows of a file or directory.

  Args:
    names: metric names; empty for accuracy on rows with choices and loss on
      all others.
    max_examples: the maximum number of examples of a prompt.
  """
  if names:
    prompts = eval_sets.prompts(eval_sets.EVALUATION, rows, max_examples)
    return {name: prompts for name in metric_names() if name in names}
  plan = {}
  for name, has_choices in ((ACCURACY, True), (LOSS, False)):
    matching = [row for row in rows if bool(row.choices) == has_choices]
    if matching:
      plan[name] = eval_sets.prompts(
        eval_sets.EVALUATION, matching, max_examples
      )
  return plan


def plan_from_run(
  run: LoadedModel, sources: TrainingData, names: Sequence[str] = ()
) -> EvalPlan:
  """Makes the plan for a run's held-out rows.

  Args:
    names: metric names; empty for accuracy, if rows have choices, and loss.

  Raises:
    ValueError: there are no held-out rows for a named metric.
  """
  ranked = eval_sets.prompts_with_choices(run.config, sources)
  max_examples = run.config.evaluation.max_examples
  rows = eval_sets.loss_rows(run.config, sources, max_examples)
  by_task = eval_sets.whole_tasks(rows, max_examples)
  plan = {
    name: ranked if name == ACCURACY else by_task
    for name in metric_names()
    if name in (names or (ACCURACY, LOSS))
  }
  missing = [name for name, prompts in plan.items() if not prompts]
  if names and missing:
    raise ValueError(
      f"--metrics asks for {', '.join(missing)}, of which the run's held-out "
      f'rows have none ({ACCURACY} is of rows with choices); name other rows '
      'with --data'
    )
  return {name: prompts for name, prompts in plan.items() if prompts}


class PartialResults:
  """A file of the results so far, from which a killed evaluation resumes."""

  def __init__(self, path: str, info: EvalInfo):
    """Reads the results in the file; those that differ in `info` are ignored.

    Args:
      path: the file; '' to keep results in memory only.

    Raises:
      ValueError: a line is not a result. The last line may be incomplete.
    """
    self.path = path
    self._file = None
    self._results: dict[tuple[str, str, str], Result] = {}
    if not path:
      return
    # Opening the log cuts an incomplete last line off.
    self._file = MetricsLog(path, info.step)
    expected = {key: value for key, value in vars(info).items() if key != 'run'}
    for result in results_lib.read(path) if os.path.getsize(path) else ():
      if expected.items() <= vars(result).items():
        # Another spelling of the work directory is the same run.
        self._store(dataclasses.replace(result, run=info.run))

  def get(self, prompt: PromptExamples, metric: str) -> Result | None:
    """A prompt's result, if there is one of the same examples."""
    result = self._results.get((prompt.task, prompt.name, metric))
    if result is None:
      return None
    if result.examples + result.left_out != len(prompt.examples):
      return None
    return result if {*result.idx} <= {e.idx for e in prompt.examples} else None

  def add(self, results: Iterable[Result]) -> None:
    """Adds results, and appends them to the file.

    Raises:
      OSError: the disk is full.
    """
    for result in results:
      self._store(result)
      if self._file is not None:
        self._file.write(vars(result))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()

  def _store(self, result: Result) -> None:
    self._results[result.task, result.prompt, result.metric] = result
