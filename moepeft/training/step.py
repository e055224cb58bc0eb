# SPDX-License-Identifier: Apache-2.0
"""The training step, (state, batch) -> (state, metrics).

Everything below runs in one jitted program. It accumulates sums over examples,
not means, so that a batch in parts has the gradient of the whole batch.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from moepeft.core.ranges import is_zero
from moepeft.core.types import Array, Batch, State
from moepeft.moe import aux_losses, router_state, router_stats
from moepeft.objectives import Objective
from moepeft.objectives.cross_entropy import mean_loss
from moepeft.peft import Built
from moepeft.peft.build import routers as method_routers
from moepeft.peft.tied_layers import tie
from moepeft.training import grad_accumulation

TrainStep = Callable[[State, Batch], tuple[State, dict[str, Any]]]


def make_train_step(
  model: nn.Module,
  method: Built,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  router_losses: Mapping[str, float] = types.MappingProxyType({}),
  accumulate: int = 1,
) -> TrainStep:
  """
  Args:
    router_losses: weights by name; see `moepeft.moe.aux_losses`.
    accumulate: the number of sequential parts of a batch.

  Returns:
    A step. Its metrics are the objective's sums over the batch and 'loss',
    'router_loss' and 'gradient_norm'.
  """
  routers = method_routers(method.method, method.semantics)
  weighted = {n for n, weight in router_losses.items() if not is_zero(weight)}
  nonlinear = ('routing',) if weighted - {*aux_losses.PARAMETER_LOSSES} else ()

  def parameter_loss(weights):
    tied = tie(weights, method.tied_arrays)
    return aux_losses.parameter_loss(tied, method.down_arrays, router_losses)

  def train_step(state: State, batch: Batch):
    rng = jax.random.fold_in(state.rng, state.step)

    def prepare_rows(rows, rng):
      # By the policy before this step, without gradients.
      variables = method.variables(state)
      return objective.prepare_rows(model.apply, variables, rows, rng)

    if objective.prepare_rows:
      rows_rng = jax.random.fold_in(rng, 1)
      batch = objective.prepare_batch(
        batch
        | grad_accumulation.mapped(prepare_rows, batch, rows_rng, accumulate)
      )

    weights, untrained = router_state.split(
      state.trainable, method.frozen_arrays
    )

    def sums_fn(weights, rows, rng):
      # `rows` may be a part of the batch, so this must not average over them.
      tied = tie(weights, method.tied_arrays)
      trainable = router_state.join(tied, untrained)
      variables = method.variables(state.replace(trainable=trainable))
      total, sums = objective(model.apply, variables, rows, split_rngs(rng))
      return sums | {'total': total}

    def loss_fn(sums):
      # Sums over the whole batch.
      loss = mean_loss(sums['total'], sums)
      sites = router_stats.collect(sums['routing'])
      router_loss = aux_losses.auxiliary_loss(sites, router_losses)
      return loss + router_loss, sums | {
        'loss': loss,
        'router_loss': router_loss,
      }

    gradient, metrics = grad_accumulation.gradient(
      sums_fn, loss_fn, weights, batch, rng, accumulate, nonlinear
    )
    if weighted & {*aux_losses.PARAMETER_LOSSES}:
      loss, slope = jax.value_and_grad(parameter_loss)(weights)
      gradient = jax.tree.map(jnp.add, gradient, slope)
      metrics['router_loss'] += loss
    updates, opt = optimizer.update(gradient, state.opt, weights)
    next_state = state.replace(
      step=state.step + 1,
      trainable=router_state.join(
        tie(optax.apply_updates(weights, updates), method.tied_arrays),
        router_state.update(untrained, metrics['routing'], routers),
      ),
      opt=opt,
    )
    return next_state, metrics | {
      'gradient_norm': optax.global_norm(gradient),
      'routing': router_stats.without_loss_sums(metrics['routing']),
    }

  return train_step


def split_rngs(rng: Array) -> dict[str, Array]:
  """The PRNG keys of the model call in a training step."""
  dropout, router = jax.random.split(rng)
  return {'dropout': dropout, 'router': router}
