# SPDX-License-Identifier: Apache-2.0
"""Registry entries of optimizers and schedules."""

import dataclasses
from collections.abc import Callable

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """An optimizer and the keys that it reads.

  Attributes:
    make: (learning_rate, weight_decay, **keys) -> GradientTransformation;
      learning_rate is a schedule. Clipping and parameter groups are not its
      concern.
    keys: of config.optimizer, beyond those that every optimizer has; passed
      to `make` by name.
  """

  make: Callable[..., optax.GradientTransformation]
  keys: tuple[str, ...] = ()

  @property
  def config_keys(self) -> tuple[str, ...]:
    return tuple(f'optimizer.{key}' for key in self.keys)


@dataclasses.dataclass(frozen=True)
class ScheduleSpec:
  """A learning rate schedule and the keys that it reads.

  Attributes:
    make: (learning_rate, steps, **keys) -> (step -> learning rate), from the
      end of the warm-up on: its step 0 has the peak rate.
    keys: as `OptimizerSpec.keys`.
    depends_on_steps: whether the rate at a step depends on the number of steps
      of the run, which may then not change when it goes on.
  """

  make: Callable[..., optax.Schedule]
  keys: tuple[str, ...] = ()
  depends_on_steps: bool = True

  @property
  def config_keys(self) -> tuple[str, ...]:
    return tuple(f'optimizer.{key}' for key in self.keys)
