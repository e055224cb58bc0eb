# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a training run from its config.

Config objects end here: the parts below take explicit arguments.
"""

from collections.abc import Callable

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from moepeft.moe import aux_losses
from moepeft.objectives import build_objective
from moepeft.peft import Built
from moepeft.training import grad_accumulation
from moepeft.training.step import TrainStep, make_train_step


def build_train_step(
  config: ConfigDict,
  model: nn.Module,
  method: Built,
  optimizer: optax.GradientTransformation,
  reference: Callable | None = None,
) -> TrainStep:
  """The training step that a config describes, not jitted yet.

  Raises:
    ValueError: a router loss has an unknown name, or the batch cannot be
      split; found before anything is compiled.
  """
  router_losses = dict(config.router_losses)
  aux_losses.auxiliary_loss({}, router_losses)
  grad_accumulation.check(config.batch_size, config.gradient_accumulation_steps)
  return make_train_step(
    model,
    method,
    build_objective(config, reference),
    optimizer,
    router_losses,
    config.gradient_accumulation_steps,
  )
