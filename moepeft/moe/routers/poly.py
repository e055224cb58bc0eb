# SPDX-License-Identifier: Apache-2.0
"""A learned choice of experts for each task: Polytropon."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import (
  EXPERTS,
  example_ids,
  mask_experts,
  same_in_example,
)
from moepeft.moe.router import RouterSpec
from moepeft.moe.task_names import TASKS, by_task, task_rows
from moepeft.nn.initializers import SymmetricUniform, peft_param


class Poly(nn.Module):
  """weights = z over their sum; z = sigmoid(the logits of a token's task).

  In training z is a sample of the relaxed Bernoulli distribution with
  temperature 1, drawn for each example: logistic noise on the logits.

  Source: Ponti et al., arXiv:2202.13914, its Gumbel-sigmoid; where the table
  starts and the sigmoid after training, as in mttl and peft.

  Parameters: table [tasks + 1, e], whose first row is that of padding; with
  splits, [tasks + 1, splits, e].

  Attributes:
    experts: e; tasks: names in the data; splits: equal parts of the experts'
      inputs and outputs, each with weights of its own, as in multi-head routing
      (Caccia et al., arXiv:2211.03831).
  """

  experts: int = option(1, EXPERTS)
  tasks: tuple[str, ...] = option((), TASKS)
  splits: int = option(1, Range(1, 65_536))

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    parts, axes = (self.experts,), 'ge'
    if self.splits > 1:
      parts, axes = (self.splits, self.experts), 'gme'
    shape = (task_rows('poly', self.tasks), *parts)
    table = peft_param(self, 'table', SymmetricUniform(1e-3), shape, axes)
    logits = by_task(table.reshape(shape[0], -1), x, ctx)
    logits = logits.reshape(*logits.shape[:-1], *parts)
    logits = mask_experts(logits, ctx)
    noisy = logits
    if ctx.train:
      noise = jax.random.logistic(self.make_rng('router'), logits.shape)
      noisy += same_in_example(noise, example_ids(x, ctx))
    z = jax.nn.sigmoid(noisy)
    return Routing(logits, z / (jnp.sum(z, axis=-1, keepdims=True) + 1e-12))


ROUTER = RouterSpec(Poly, needs_tasks=True)
