# SPDX-License-Identifier: Apache-2.0
"""The state of the training loop, which callbacks read and modify."""

import dataclasses
import functools
from collections.abc import Mapping
from signal import Signals
from typing import Any

from jax.sharding import Mesh

from moepeft.checkpoints.manager import Checkpoints
from moepeft.checkpoints.run_progress import RunProgress
from moepeft.core.progress import Progress
from moepeft.core.types import State, Tree
from moepeft.data.loader import Loader
from moepeft.evaluation.evaluator import Evaluator
from moepeft.peft import Built
from moepeft.runs.directory import Workdir
from moepeft.runs.history import History
from moepeft.runs.run import Run
from moepeft.runs.trackers import Tracker
from moepeft.training.metrics_logger import MetricsLogger
from moepeft.training.step import TrainStep
from moepeft.training.task_routing import TaskRouting


@dataclasses.dataclass
class TrainingLoop:
  """A run between its first step and its last.

  Attributes:
    steps: the number of the last step.
    step: the number of steps done.
    first_step: the number of steps done before this process started.
    state: on the devices; `train_step` donates it.
    train_step: jitted; takes batches on `mesh`.
    batches: an iterator of batches on the host.
    method: the PEFT method, built for the model.
    evaluator: measures held-out rows.
    run: names the files in the run's directory.
    workdir: holds the lock of the directory; None in processes other than the
      first, which write nothing but their share of checkpoints.
    identity: of the run, written into each checkpoint.
    run_progress: the position in the data and the best validation loss so far,
      saved in checkpoints.
    trackers: receive rows of metrics; `history` is one of them.
    history: the rows that are plotted.
    metrics: buffers the metrics of steps for the trackers.
    task_routing: measures the experts by task; None without routers or several
      tasks, or if no plot asks for it.
    validation: metrics of held-out rows after this step; None after a step
      without a validation.
    before, after: evaluations before the first step and after the last one;
      {} without them.
    save_requested: set by a callback to save this step.
    stop_requested: set by a callback to save this step and end the run.
    signal: the signal that ends the run, or None.
  """

  steps: int
  step: int
  first_step: int
  state: State
  train_step: TrainStep
  mesh: Mesh
  batches: Loader
  method: Built
  evaluator: Evaluator
  run: Run
  workdir: Workdir | None
  checkpoints: Checkpoints
  identity: dict[str, Any]
  run_progress: RunProgress
  trackers: list[Tracker]
  history: History
  metrics: MetricsLogger
  task_routing: TaskRouting | None = None
  validation: dict[str, float] | None = None
  before: dict[str, Any] = dataclasses.field(default_factory=dict)
  after: dict[str, Any] = dataclasses.field(default_factory=dict)
  save_requested: bool = False
  stop_requested: bool = False
  signal: Signals | None = None

  @functools.cached_property
  def progress(self) -> Progress:
    """The progress bar, created at first use, after that of the evaluation."""
    return Progress(self.steps, self.first_step)

  @property
  def variables(self) -> dict[str, Tree]:
    """The model's variables after this step."""
    return self.method.variables(self.state)

  @property
  def is_last_step(self) -> bool:
    return self.step == self.steps or self.stop_requested

  def is_due(self, every: int) -> bool:
    """Whether this step is a multiple of `every`; never if it is 0."""
    return every > 0 and self.step % every == 0

  def flush_metrics(self) -> None:
    """Writes the metrics of all steps so far to the trackers.

    Raises:
      ValueError: a loss or a gradient norm is not finite.
    """
    self.metrics.flush(self.progress)

  def log(self, metrics: Mapping[str, Any]) -> None:
    """Writes a row of metrics of this step, after the buffered metrics."""
    self.flush_metrics()
    self.metrics.write({'step': self.step, **metrics})


class Stopped(Exception):
  """A run that a signal ended, after it was saved.

  Attributes:
    code: the exit code that shells expect, 128 and the signal's number.
  """

  def __init__(self, received: Signals, step: int, path: str):
    super().__init__(
      f'stopped by {received.name} after step {step}, which is saved in '
      f'{path}; the same command goes on from there'
    )
    self.code = 128 + received
