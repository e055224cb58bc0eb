# SPDX-License-Identifier: Apache-2.0
"""The interface of a callback, and its entry in the registry."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from moepeft.core.types import Batch
from moepeft.training.loop import TrainingLoop


class Callback:
  """Acts between the steps of a run; override the hooks that are needed."""

  def on_start(self, loop: TrainingLoop) -> None:
    """Called before the first step of this process."""

  def on_step(
    self, loop: TrainingLoop, batch: Batch, metrics: Mapping[str, Any]
  ) -> None:
    """Called after each step.

    Args:
      batch: the step's, on the host.
      metrics: the step's, on the device; reading one waits for the step.
    """

  def on_end(self, loop: TrainingLoop) -> None:
    """Called after the last step, also where a signal ended the run."""

  def close(self) -> None:
    """Called when the run ends in whatever way, an error among them."""


@dataclasses.dataclass(frozen=True)
class CallbackEntry:
  """A callback in the registry `CALLBACKS`.

  Attributes:
    build: config -> the callback. Called before any data is read, so that a
      value which is not allowed is refused early, with a ValueError.
    enabled_by: keys of the config that turn the callback on, where one of
      them is neither 0, '' nor False; () where config.callbacks has to name
      it.
    order: callbacks run in this order; equal ones as they are registered. At
      30 metrics are written and validation is done, from 80 on the run is
      saved.
  """

  build: Callable[[ConfigDict], Callback]
  enabled_by: tuple[str, ...] = ()
  order: int = 50
