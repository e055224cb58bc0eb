# SPDX-License-Identifier: Apache-2.0
"""One vmapped step for runs that differ in seeds and numbers alone.

Adapters, optimizer states, RNG keys, batches and numbers such as learning rates
have a leading axis of runs; the frozen base is shared. Each run has the loop,
the callbacks and the directory that it has alone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moepeft.config import program
from moepeft.core.types import Array, Batch, State, Tree
from moepeft.training.loop import TrainingLoop
from moepeft.training.step import TrainStep


class RowLoop(TrainingLoop):
  """A run whose state is a row of stacked states, sliced when it is read."""

  _state: State | None
  _read_row: Callable[[], State]

  @property
  def state(self) -> State:
    if self._state is None:
      self._state = self._read_row()
    return self._state

  @state.setter
  def state(self, state: State) -> None:
    self._state = state

  def follow(self, read_row: Callable[[], State]) -> None:
    """Makes `state` the one that `read_row` returns, before the next step."""
    self._state, self._read_row = None, read_row


class VmappedStep:
  """A training step of several runs, and their stacked states.

  The states of runs may be at different steps. A run that has ended keeps its
  row, which is computed and not read.
  """

  def __init__(
    self,
    make_step: Callable[[ConfigDict], TrainStep],
    configs: Sequence[ConfigDict],
    states: Sequence[State],
  ):
    """
    Args:
      make_step: config -> the step of a run alone.
      configs: of the runs, which differ in the seed and in numbers alone.
      states: of the runs; `frozen` and `reference` are those of the first.
    """
    first = states[0]
    self._shared = {'frozen': first.frozen, 'reference': first.reference}
    without_shared = dict.fromkeys(self._shared, ())
    self._rows = jax.jit(stack)([s.replace(**without_shared) for s in states])
    self._numbers = differing_numbers(configs)
    step = vmapped(make_step, configs[0])
    self._step = jax.jit(step, donate_argnums=1)
    self._read = jax.jit(lambda rows, i: jax.tree.map(lambda a: a[i], rows))

  def __call__(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Does a step of every run; returns their metrics.

    Args:
      batches: a batch on the host for each run, of equal shapes.
    """
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    self._rows, metrics = self._step(
      self._numbers, self._rows, self._shared, stacked
    )
    return metrics

  def state(self, row: int) -> State:
    """The state of a run after the last step."""
    return self._read(self._rows, row).replace(**self._shared)


def differing_numbers(configs: Sequence[ConfigDict]) -> dict[str, Array]:
  """{config key: [runs]} of the numbers that differ between runs."""
  by_run = [program.numbers(config) for config in configs]
  values = {key: [numbers[key] for numbers in by_run] for key in by_run[0]}
  return {
    key: jnp.asarray(v, float) for key, v in values.items() if len(set(v)) > 1
  }


def parametric(
  make_step: Callable[[ConfigDict], TrainStep], config: ConfigDict
) -> Callable[..., tuple[State, dict[str, Any]]]:
  """(numbers, state, shared, batch) -> (state, metrics), not jitted.

  Args:
    make_step: config -> a training step.
    config: whose `numbers`, {config key: value}, are arguments of the step. The
      fields `shared` of a state are apart, and empty in the state itself.
  """

  def step(
    numbers: Mapping[str, Array], state: State, shared: Tree, batch: Batch
  ):
    train_step = make_step(program.with_numbers(config, numbers))
    new_state, metrics = train_step(state.replace(**shared), batch)
    return new_state.replace(**dict.fromkeys(shared, ())), metrics

  return step


def vmapped(
  make_step: Callable[[ConfigDict], TrainStep], config: ConfigDict
) -> Callable[..., tuple[State, list[dict[str, Any]]]]:
  """`parametric` with a leading axis of runs, but for `shared`.

  It returns the states, and a list of the metrics of each run.
  """
  vmapped_step = jax.vmap(parametric(make_step, config), (0, 0, None, 0))

  def steps(numbers, states, shared, batches):
    states, metrics = vmapped_step(numbers, states, shared, batches)
    return states, [
      jax.tree.map(functools.partial(_row, i), metrics)
      for i in range(states.step.shape[0])
    ]

  return steps


def _row(i: int, array: Array) -> Array:
  return array[i]


def stack(trees: Sequence[Tree]) -> Tree:
  """Trees of arrays as one tree, with a leading axis."""
  return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
