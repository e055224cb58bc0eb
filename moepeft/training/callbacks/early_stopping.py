# SPDX-License-Identifier: Apache-2.0
"""Saves the step of the best validation loss; stops a stalled run."""

from moepeft.training.callbacks.callback import Callback, CallbackEntry


class ValidationLossTracking(Callback):
  """Updates `loop.run_progress` after every validation."""

  def __init__(self, patience: int, save_best: bool):
    """
    Args:
      patience: number of validations without a better loss after which the run
        ends; 0: never.
      save_best: whether a step with a better loss is saved.
    """
    self._patience, self._save_best = patience, save_best

  def on_start(self, loop):
    self._stop_if_stalled(loop)

  def on_step(self, loop, batch, metrics):
    if loop.validation is None:
      return
    loop.run_progress = loop.run_progress.after_validation(
      loop.validation['validation_loss'], loop.step
    )
    if self._save_best and loop.run_progress.best_step == loop.step:
      loop.save_requested = True
    self._stop_if_stalled(loop)

  def _stop_if_stalled(self, loop):
    if loop.step < loop.steps and loop.run_progress.is_patience_exhausted(
      self._patience
    ):
      loop.stop_requested = True
      loop.progress.print_line(
        f'stopped at step {loop.step}: the validation loss was least, '
        f'{loop.run_progress.best:.4f}, at step '
        f'{loop.run_progress.best_step} '
        f'(config.early_stopping_patience={self._patience})'
      )


EARLY_STOPPING = CallbackEntry(
  build=lambda config: ValidationLossTracking(
    config.early_stopping_patience, config.checkpoint.keep_best
  ),
  enabled_by=('evaluation.every_steps',),
  order=30,
)
