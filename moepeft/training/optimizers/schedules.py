# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules after the warm-up."""

import optax

from moepeft.training.optimizers.spec import ScheduleSpec


def constant(learning_rate: float, steps: int) -> optax.Schedule:
  del steps
  return optax.constant_schedule(learning_rate)


def linear(learning_rate: float, steps: int) -> optax.Schedule:
  """Falls evenly to zero at the last step."""
  return optax.linear_schedule(learning_rate, 0.0, steps)


def cosine(learning_rate: float, steps: int) -> optax.Schedule:
  """Falls to zero at the last step, along half a cosine."""
  return optax.cosine_decay_schedule(learning_rate, steps)


CONSTANT = ScheduleSpec(constant, depends_on_steps=False)
LINEAR = ScheduleSpec(linear)
COSINE = ScheduleSpec(cosine)
