# SPDX-License-Identifier: Apache-2.0
"""A model with its adapters, programs and cache; for the engine's thread."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moepeft.core.types import Array, Tree
from moepeft.inference.adapters.protocol import Banks
from moepeft.inference.engine import (
  decoder_programs,
  encoder_decoder_programs,
  kv_cache,
)
from moepeft.inference.engine.compiled import Key, Programs, plan_picking
from moepeft.inference.engine.limits import EngineConfig
from moepeft.inference.engine.per_layer import ServedModel
from moepeft.inference.engine.row_sampler import StepOutput
from moepeft.inference.engine.weights import Weights


class ModelRunner:
  """What computes; its methods are named as its programs."""

  def __init__(
    self, model: Any, params: Tree, banks: Banks, settings: EngineConfig
  ):
    self.model = model.clone(adapter_map=banks.adapter_map)
    self.settings, self.banks = settings, banks
    together = settings.together
    if together is None:
      together = jax.default_backend() != 'cpu'
    self._weights = Weights(params, banks, together)
    self.programs = Programs(self._weights, settings.slots)
    of = ServedModel(self.model, banks.row_tree, settings.routing)
    decoder_only = hasattr(model, 'extend')
    self.rooms = (
      decoder_programs.rooms(settings) if decoder_only else settings.rooms
    )
    plan = (
      decoder_programs.plan if decoder_only else encoder_decoder_programs.plan
    )
    plan(self.programs, of, settings)
    plan_picking(self.programs, model.config.vocab)
    self._cache: Any = None

  def compile(self, progress: Callable[[str, int, int], None]) -> None:
    """Makes every program, and the cache.

    Args:
      progress: as of `protocol.Engine.start`.
    """
    self.programs.compile(progress)
    self.renew()

  def renew(self) -> None:
    """An empty cache: for the start, and after a step that broke off."""
    self._cache = None
    self._cache = kv_cache.zeros(self.programs.cache)

  @property
  def whole(self) -> bool:
    """Whether the cache is there: a step that breaks off may take it along."""
    return not any(a.is_deleted() for a in jax.tree.leaves(self._cache))

  def step(
    self, n: int, room: int, adapters: np.ndarray, rows: np.ndarray, *inputs
  ) -> StepOutput:
    """A token of n rows.

    Args:
      adapters: int32 [n, z]; rows: int32 [n], slots.
      inputs: int32 [n] each, as of `reading.Reader.inputs`.
    """
    return self._run(('step', n, room), adapters, rows, inputs[1], *inputs)

  def fill(
    self, t: int, room: int, adapters: np.ndarray, slot: int, ids, start, count
  ) -> tuple[Array, Tree]:
    """A chunk of a prompt: ids int32 [t], `count` real ones from `start` on,
    read with adapters int32 [z] into a slot."""
    row, start, count = (np.array([a], np.int32) for a in (slot, start, count))
    args = adapters[None], row, start, ids[None], start, count
    return self._run(('fill', t, room), *args)

  def attach(
    self, room: int, adapters: np.ndarray, slot: int, states: Array, length: int
  ) -> None:
    """Puts encoded inputs [room, d] into a slot."""
    row, length = (np.array([a], np.int32) for a in (slot, length))
    start = np.zeros(1, np.int32)
    args = adapters[None], row, start, states[None], length
    self._run(('attach', room), *args)

  def encode(
    self, s: int, adapters: np.ndarray, ids: np.ndarray, length: int
  ) -> Array:
    """Inputs int32 [s], `length` of them real, as states [room, d]."""
    none = np.zeros(1, np.int32)
    length = np.array([length], np.int32)
    args = adapters[None], none, none, ids[None], length
    return self._run(('encode', s), *args)

  def score(
    self, t: int, adapters: np.ndarray, *args: np.ndarray | Array
  ) -> tuple[Array, ...]:
    w = self._weights
    return self.programs[('score', t)](w.params, w.bank, adapters[None], *args)

  def copy(self, source: int, target: int) -> None:
    program = self.programs[('copy',)]
    self._cache = program(self._cache, np.int32(source), np.int32(target))

  def clear(self, slot: int) -> None:
    self._cache = self.programs[('clear',)](self._cache, np.int32(slot))

  def _run(self, key: Key, adapters, rows, places, *inputs) -> Any:
    """Calls a method: what it says."""
    method, length = self.programs.methods[key]
    cached = method.put is not None
    w = self._weights
    layers, bank = w.layers[method.side], w.layer_bank(method.side)
    if w.together:
      cache, said = self.programs[key](
        *(w.params, layers, w.bank, bank, self._cache if cached else {}),
        *(adapters, rows, places, *inputs),
      )
      if cached:
        self._cache = cache
      return said
    shared = w.params, w.bank, adapters
    x, flow = self.programs[(*key, 'before')](*shared, *inputs)
    told, program = [], self.programs[(*key, 'layer')]
    for i in range(length):
      cache = self._cache[i] if cached else {}
      x, cache, own = program(
        *(layers[i], bank, cache, adapters, rows, places, np.int32(i), x, flow)
      )
      told.append(own)
      if cached:
        self._cache[i] = cache
    return self.programs[(*key, 'after')](*shared, x, told, *inputs)
