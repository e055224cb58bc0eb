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
      learning_rate is a schedule. `make_optimizer` adds clipping and parameter
      groups.
    keys: further keys of config.optimizer, passed to `make` by name.
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
    make: (learning_rate, steps, **keys) -> (step -> learning rate). Step 0 is
      the end of the warm-up and has the peak rate.
    keys: as `OptimizerSpec.keys`.
    depends_on_steps: whether the rate at a step depends on the total number of
      steps, which a resumed run must then not change.
  """

  make: Callable[..., optax.Schedule]
  keys: tuple[str, ...] = ()
  depends_on_steps: bool = True

  @property
  def config_keys(self) -> tuple[str, ...]:
    return tuple(f'optimizer.{key}' for key in self.keys)
