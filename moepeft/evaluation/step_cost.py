# SPDX-License-Identifier: Apache-2.0
"""Time and memory of compiled training steps, over those of a baseline.

A step is the loss and the gradients of what is trained, without optimizer, on a
batch of the config's size without padding; weights are random. Two methods take
turns, and the ratio of their times is the median over the rounds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_flops import batch_shapes
from moepeft.core.types import Batch, Tree
from moepeft.models import check_decodes
from moepeft.moe import router_state
from moepeft.objectives.cross_entropy import DEFAULTS, token_nll_and_loss


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A compiled training step.

  Attributes:
    run: () -> runs the step to its end.
    memory: the bytes that it needs beside its arguments; None if unknown.
  """

  run: Callable[[], object]
  memory: int | None


def take_turns(
  steps: Mapping[str, CompiledStep], rounds: int
) -> dict[str, list[float]]:
  """{name: seconds of a step, one a round}, after a step that is not timed."""
  times = {name: [] for name in steps}
  for number in range(rounds + 1):
    for name, step in steps.items():
      began = time.perf_counter()
      step.run()
      if number:
        times[name].append(time.perf_counter() - began)
  return times


def measure(config: ConfigDict, baseline: str, rounds: int) -> dict[str, Any]:
  """Compiles and times a config's method and a baseline.

  Returns:
    {'baseline', 'step_time' and 'memory' over those of the baseline,
    'memory_megabytes' beside the arguments}.

  Raises:
    ValueError: the model has no decoder, or the baseline is no method.
  """
  reference = config.copy_and_resolve_references()
  reference.method = baseline
  steps = compile_step(config), compile_step(reference)
  memory, of_baseline = (step.memory or 0 for step in steps)
  return {
    'baseline': baseline,
    'step_time': round(time_ratio(*steps, rounds), 2),
    'memory': round(memory / of_baseline, 2) if of_baseline else None,
    'memory_megabytes': round(memory / 1e6, 3),
  }


def time_ratio(
  step: CompiledStep, reference: CompiledStep, rounds: int
) -> float:
  """The median over rounds of the step's time over that of the reference."""
  times = take_turns({'step': step, 'reference': reference}, rounds)
  pairs = zip(times['step'], times['reference'], strict=True)
  return statistics.median(a / b for a, b in pairs)


def compile_step(config: ConfigDict) -> CompiledStep:
  """A config's step, compiled for the first device."""
  family, shape = base_lib.shape(config.model)
  check_decodes(shape)
  base = base_lib.Base(family, shape, None, '', '')
  model, built = base_lib.module(base, config)
  variables = base_lib.initialise(base, model, config.seed)
  weights = variables.pop(built.trainable)
  trained, state = router_state.split(weights, built.frozen_arrays)
  batch = _fill(batch_shapes(config, shape, built)[0], shape.vocab)

  def loss(trained: Tree, state: Tree, frozen: Tree, batch: Batch) -> jax.Array:
    weights = router_state.join(trained, state)
    variables = {**frozen, built.trainable: weights}
    rngs = {name: jax.random.key(0) for name in ('router', 'dropout')}
    logits = model.apply(variables, batch, train=True, rngs=rngs)
    return jnp.mean(token_nll_and_loss(logits, batch['targets'], DEFAULTS)[1])

  arguments = jax.device_put((trained, state, variables, batch))
  step = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
  analysis = step.memory_analysis()
  return CompiledStep(
    lambda: jax.block_until_ready(step(*arguments)),
    analysis and analysis.temp_size_in_bytes,
  )


def _fill(shapes: Batch, vocab: int) -> Batch:
  """Random tokens of task 1, without padding."""
  rng = np.random.default_rng(0)
  batch = {}
  for name, leaf in shapes.items():
    if leaf.dtype == bool or name.endswith('_tasks'):
      batch[name] = np.ones(leaf.shape, leaf.dtype)
    elif np.issubdtype(leaf.dtype, np.integer):
      batch[name] = rng.integers(2, vocab, leaf.shape, np.int32)
    else:
      batch[name] = rng.standard_normal(leaf.shape, leaf.dtype)
  return batch
