# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning rate schedules, by config.

A new one is a file and a line in OPTIMIZERS or SCHEDULES;
docs/extending/optimizer.md and schedule.md have worked examples.
"""

import types
from collections.abc import Mapping

import optax
from ml_collections import ConfigDict

from moepeft.core.registry import Registry
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.training.optimizers import groups as parameter_groups
from moepeft.training.optimizers.expert_padding import without_padding

OPTIMIZERS = Registry(
  'optimizer',
  'moepeft.training.optimizers',
  {'adamw': 'adamw:ADAMW', 'adafactor': 'adafactor:ADAFACTOR'},
)
SCHEDULES = Registry(
  'schedule',
  'moepeft.training.optimizers',
  {
    'constant': 'schedules:CONSTANT',
    'linear': 'schedules:LINEAR',
    'cosine': 'schedules:COSINE',
  },
)


def make_schedule(
  config: ConfigDict, steps: int, learning_rate: float | None = None
) -> optax.Schedule:
  """Makes step -> learning rate: a linear warm-up, then the named schedule.

  Args:
    config: config.optimizer.
    steps: the number of steps of the run.
    learning_rate: the peak; None for the config's.

  Raises:
    ValueError: the schedule is unknown.
  """
  peak = config.learning_rate if learning_rate is None else learning_rate
  warmup = config.warmup_steps
  spec = SCHEDULES.lookup(config.schedule)
  keys = {key: config[key] for key in spec.keys}
  schedule = spec.make(peak, max(steps - warmup, 1), **keys)
  if not warmup:
    return schedule
  # The first update is not wasted on a rate of zero.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, schedule], [warmup])


def make_optimizer(
  config: ConfigDict,
  steps: int,
  padded: Mapping[str, PaddedAxis] = types.MappingProxyType({}),
) -> optax.GradientTransformation:
  """Makes the gradient transformation that a config describes.

  Args:
    config: config.optimizer.
    steps: the number of steps of the run, for the schedule.
    padded: {path of a parameter: its padded axis}, hidden from the optimizer.

  Raises:
    ValueError: the optimizer or schedule is unknown, or config.groups has an
      invalid form. The transformation's `init` raises it for a pattern that
      matches no parameter.
  """
  spec = OPTIMIZERS.lookup(config.name)
  keys = {key: config[key] for key in spec.keys}

  def make(
    learning_rate: float | None = None, weight_decay: float | None = None
  ) -> optax.GradientTransformation:
    decay = config.weight_decay if weight_decay is None else weight_decay
    schedule = make_schedule(config, steps, learning_rate)
    optimizer = spec.make(learning_rate=schedule, weight_decay=decay, **keys)
    return without_padding(optimizer, padded) if padded else optimizer

  groups = parameter_groups.parse_groups(config.groups)
  update = make()
  if groups:
    update = optax.multi_transform(
      {
        parameter_groups.DEFAULT: update,
        **{
          f'group_{i}': make(
            group.learning_rate
            if group.rate_ratio is None
            else group.rate_ratio * config.learning_rate,
            group.weight_decay,
          )
          for i, group in enumerate(groups)
        },
      },
      parameter_groups.label_fn(groups),
    )
  if config.max_grad_norm:
    # One norm for the gradient of all groups.
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)
  return update
