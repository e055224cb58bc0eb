# SPDX-License-Identifier: Apache-2.0
"""The interface of a callback, and its entry in the registry."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.core.types import Batch
from moepeft.training.loop import TrainingLoop


class Callback:
  """Acts between the steps of a run; override the hooks that are needed.

  Attributes:
    is_of_process: whether the runs of a process share it, where several are
      trained together; it is then closed after the last of them.
  """

  is_of_process = False

  def on_start(self, loop: TrainingLoop) -> None:
    """Called before the first step of this process."""

  def on_step(
    self, loop: TrainingLoop, batch: Batch, metrics: Mapping[str, Any]
  ) -> None:
    """Called after each step.

    Args:
      batch: the batch of the step, on the host.
      metrics: metrics of the step, on the device; reading one waits for the
        step.
    """

  def on_end(self, loop: TrainingLoop) -> None:
    """Called after the last step, also if a signal ended the run."""

  def close(self) -> None:
    """Called when the run ends, with or without an error."""


@dataclasses.dataclass(frozen=True)
class CallbackEntry:
  """A callback in the registry `CALLBACKS`.

  Attributes:
    build: config -> the callback. Called before any data is read, so that an
      invalid value raises a ValueError early.
    enabled_by: config keys; the callback is enabled if any of them is not 0, ''
      or False. With (), it is enabled by its name in config.callbacks only.
    order: callbacks run in ascending order, equal ones in registration order.
      Metrics and validation have orders up to 30, saving starts at 80.
  """

  build: Callable[[ConfigDict], Callback]
  enabled_by: tuple[str, ...] = ()
  order: int = 50
