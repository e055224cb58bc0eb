# SPDX-License-Identifier: Apache-2.0
"""Softmax routing whose balance is localised to two groups: LoRAMoE."""

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, Texts, option
from moepeft.core.types import Array, Context, Routing
from moepeft.moe.gate import LinearGate, example_ids, example_sums
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_stats import RouterStats
from moepeft.moe.task_names import TASKS, require_task_ids
from moepeft.nn.numerics import softmax

# Added to the squared mean, as in the released code.
EPSILON = 1e-10


class Localized(LinearGate):
  """weights = softmax(x W), and the sums that LoRAMoE's balance loss reads.

  The first half of the experts is for the tasks in `group`, the second for all
  others. The loss is the squared variation over examples b and experts e of

    Z_be = sum_t p_te * (1 + delta if e is of the group of b, else 1 - delta)

  so that the two groups become unlike, and the experts of one alike. Without a
  `delta` all experts are to become alike, and no task is read.

  Source: LoRAMoE (Dou et al., arXiv:2312.09979) and its released code, whose
  script has delta 0 and no weight of the loss.

  Attributes:
    tasks: names in the data.
    group: the tasks of the first half of the experts.
    delta: how much the groups differ.
  """

  tasks: tuple[str, ...] = option((), TASKS)
  group: tuple[str, ...] = option((), Texts('tasks', "['cola']"))
  delta: float = option(0.0, Range(0, 1), training_only=True)

  @nn.compact
  def __call__(self, x: Array, ctx: Context) -> Routing:
    logits, noisy = self.logits(x, ctx)
    weights = softmax(noisy)
    ids = example_ids(x, ctx)
    scaled = weights * self._scale(ctx)
    if scaled.ndim == 4:
      scaled = jnp.mean(scaled, axis=2)
    load = example_sums(scaled, ids)
    size = example_sums(jnp.ones((*ids.shape, 1)), ids)
    # Summed over an example's tokens they are Z, Z squared, and one.
    return Routing(
      logits,
      weights,
      aux={
        'localized_load': _like(scaled, weights),
        'localized_square': _like(scaled * load, weights),
        'localized_examples': _like(1 / jnp.maximum(size, 1), weights),
      },
    )

  def _scale(self, ctx: Context) -> Array:
    """[b, t, e] (or 1), by the groups of the examples and of the experts."""
    # An engine computes no losses.
    if not self.delta or ctx.decode:
      return jnp.float32(1)
    unknown = {*self.group} - {*self.tasks}
    if unknown or not self.group:
      raise ValueError(
        'localized has a delta, and compares the tasks in `group` with the '
        "others of `tasks`; write router=localized(tasks=['a', 'b'], "
        "group=['a'], delta=0.1)"
      )
    places = [1 + self.tasks.index(task) for task in self.group]
    in_group = jnp.isin(require_task_ids(ctx), jnp.array(places))
    first_half = jnp.arange(self.experts) < self.experts // 2
    alike = in_group[..., None] == first_half
    return jnp.where(alike, 1 + self.delta, 1 - self.delta)


def _like(array: Array, weights: Array) -> Array:
  """The array with an axis of heads where the weights have one."""
  if weights.ndim == 3:
    return array
  heads = weights.shape[2]
  shape = (*array.shape[:2], heads, array.shape[-1])
  return jnp.broadcast_to(array[:, :, None] / heads, shape)


def localized_balance(sums: RouterStats) -> Array:
  """var(Z) / mean(Z)^2 over the examples and experts of the batch."""
  examples = sums.aux['localized_examples'][..., 0]
  experts = jnp.asarray(sums.experts)
  cells = jnp.maximum(examples * experts, 2)
  mean = jnp.sum(sums.aux['localized_load'], axis=-1) / cells
  squares = jnp.sum(sums.aux['localized_square'], axis=-1)
  # torch.var is unbiased.
  variance = (squares - cells * mean**2) / (cells - 1)
  return jnp.mean(variance / (mean**2 + EPSILON))


ROUTER = RouterSpec(
  Localized,
  losses={
    'localized_balance': RouterLoss(
      localized_balance,
      ('localized_load', 'localized_square', 'localized_examples'),
    )
  },
)
