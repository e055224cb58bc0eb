# SPDX-License-Identifier: Apache-2.0
"""The state that training starts from: the base, the adapter, a reference."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.core.types import State
from moepeft.moe import router_state
from moepeft.objectives import OBJECTIVES, reference_model
from moepeft.peft import Built
from moepeft.peft.tied_layers import tie


def build(
  config: ConfigDict,
  base: base_lib.Base,
  model: nn.Module,
  method: Built,
  optimizer: optax.GradientTransformation,
) -> tuple[State, Callable | None, list[dict[str, str]]]:
  """(state, reference model, files of pretrained experts).

  The state is on the host; its optimizer's arrays are shapes.

  Raises:
    ValueError: nothing would be trained, the method cannot train this base, or
      the adapter to start from does not fit.
  """
  if base.params is None and method.trainable == 'peft':
    raise ValueError(
      f'{method.method} would adapt random weights; set config.model.path to '
      'a base model'
    )
  if base.quantise and method.trainable == 'params':
    raise ValueError(
      f'config.model.quantize={base.quantise!r} keeps frozen weights, and '
      "full fine-tuning trains them; set it to '', or name another method"
    )
  variables = base_lib.initialise(base, model, config.seed)
  adapter, expert_files = config.model.adapter, []
  if adapter:
    variables = base_lib.with_adapter(variables, method, adapter, base)
  else:
    variables, expert_files = base_lib.with_experts(
      variables, model, method, base
    )
  reference, reference_adapters = None, {}
  source = config.preference.reference
  spec = OBJECTIVES[config.objective]
  if spec.needs_reference:
    reference, reference_adapters = reference_model.make_reference(
      source, model, method, base, spec.reference_output
    )
  if adapter and spec.needs_reference and source == reference_model.BASE:
    print(
      'note: rewards are measured against the base without '
      f'config.model.adapter; set config.preference.reference to {adapter!r} '
      'to measure against where training begins'
    )
  trainable = tie(variables.pop(method.trainable), method.tied_arrays)
  trained, _ = router_state.split(trainable, method.frozen_arrays)
  if method.frozen_arrays and not jax.tree.leaves(trained):
    raise ValueError(
      f'{method.method} trains nothing: its experts stay as they are and its '
      'router has no parameters; set train_experts=True, or name a router that '
      'is trained'
    )
  state = State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=next(iter(variables.values())),
    # Shapes: `state_sharding.place` makes the arrays on the devices.
    opt=jax.eval_shape(
      router_state.optimizer_init(optimizer, method.frozen_arrays), trainable
    ),
    rng=jax.random.fold_in(jax.random.key(config.seed), 1),
    reference=reference_adapters,
  )
  return state, reference, expert_files
