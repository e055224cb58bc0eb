# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules, by config."""

import optax
from ml_collections import ConfigDict

from moepeft.training.adafactor import adafactor

SCHEDULES = ('constant', 'linear', 'cosine')
OPTIMIZERS = ('adamw', 'adafactor')


def schedule(optimizer: ConfigDict, steps: int) -> optax.Schedule:
  """step -> learning rate: a linear warm-up, then the named course.

  Raises:
    ValueError: the schedule does not exist.
  """
  rate, warmup = optimizer.learning_rate, optimizer.warmup_steps
  rest = max(steps - warmup, 1)
  courses = {
    'constant': lambda: optax.constant_schedule(rate),
    'linear': lambda: optax.linear_schedule(rate, 0.0, rest),
    'cosine': lambda: optax.cosine_decay_schedule(rate, rest),
  }
  if optimizer.schedule not in courses:
    raise ValueError(
      f'config.optimizer.schedule is one of {", ".join(SCHEDULES)}; got '
      f'{optimizer.schedule!r}'
    )
  course = courses[optimizer.schedule]()
  if not warmup:
    return course
  # The first update is not wasted on a rate of zero.
  ramp = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
  return optax.join_schedules([ramp, course], [warmup])


def optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """The transformation of gradients that a config names.

  Raises:
    ValueError: the optimizer or the schedule does not exist.
  """
  rate = schedule(config, steps)
  if config.name == 'adamw':
    update = optax.adamw(
      rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    )
  elif config.name == 'adafactor':
    update = adafactor(rate, config.decay_offset, config.weight_decay)
  else:
    raise ValueError(
      f'config.optimizer.name is one of {", ".join(OPTIMIZERS)}; got '
      f'{config.name!r}'
    )
  if config.max_grad_norm:
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)
  return update
