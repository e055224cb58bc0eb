# SPDX-License-Identifier: Apache-2.0
"""Evaluates held-out rows before, during and after training."""

from collections.abc import Mapping
from typing import Any

from moepeft.core import distributed
from moepeft.evaluation.summary import before_after_table
from moepeft.training.callbacks.callback import Callback, CallbackEntry

# The maximum number of tasks in the final table; before_after.png has all.
_MAX_TABLE_ROWS = 12


class HeldOutEvaluation(Callback):
  """Validates during training; ranks choices before and after it."""

  def __init__(self, every_steps: int, before: bool, after: bool):
    """
    Args:
      every_steps: steps between validations; 0 for none.
      before, after: whether to evaluate before the first step and after the
        last one.
    """
    self._every_steps = every_steps
    self._before, self._after = before, after

  def on_start(self, loop):
    self._validated_step = loop.history.last_step('validation_loss')
    if self._before and not loop.first_step:
      print('evaluating before training', flush=True)
      loop.before = loop.evaluator(loop.variables, 'before training', 0)
      distributed.write_json(loop.run.before_file, loop.before)
      if metrics := _validation_metrics(loop.before):
        loop.log(metrics)
    elif self._before and self._after:
      # Read now: a damaged file would prevent the summary at the end.
      loop.before = loop.run.before()

  def on_step(self, loop, batch, metrics):
    loop.validation = None
    if not loop.is_due(self._every_steps):
      return
    loop.flush_metrics()
    rows = loop.evaluator.validation_rows
    with loop.progress.paused('validating', rows) as count:
      loop.validation = loop.evaluator.validation(loop.variables, count)
    loop.log(loop.validation)
    self._validated_step = loop.step
    values = (
      f'{name.replace("_", " ")} {value:.4f}'
      for name, value in loop.validation.items()
    )
    loop.progress.print_line(f'step {loop.step}: {", ".join(values)}')

  def on_end(self, loop):
    if not self._after or loop.signal:
      return
    print('evaluating after training', flush=True)
    loop.after = loop.evaluator(
      loop.variables, 'after training', loop.step, loop.validation
    )
    if loop.workdir:
      # Evaluation takes minutes; the directory may have been removed since.
      loop.workdir.check()
    distributed.write_json(loop.run.after_file, loop.after)
    metrics = _validation_metrics(loop.after)
    if metrics and self._validated_step != loop.step:
      loop.log(metrics)
    if 0 < len(loop.after['rows']) <= _MAX_TABLE_ROWS:
      print(before_after_table(loop.before.get('rows', []), loop.after['rows']))


def _validation_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: value
    for name, value in evaluation.items()
    if name.startswith('validation_')
  }


EVALUATION = CallbackEntry(
  build=lambda config: HeldOutEvaluation(
    config.evaluation.every_steps,
    config.evaluation.before,
    config.evaluation.after,
  ),
  enabled_by=(
    'evaluation.every_steps',
    'evaluation.before',
    'evaluation.after',
  ),
  order=20,
)
