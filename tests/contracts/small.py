# SPDX-License-Identifier: Apache-2.0
"""Small models and batches of odd sizes, so that no axis can hide another."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import init_params
from moepeft.peft import build

# Primes, heads times head size (15) unlike d_model (11), layers unlike too.
GATED = t5.T5Config(
  vocab=37,
  d_model=11,
  heads=3,
  head_dim=5,
  ffn=17,
  encoder_layers=2,
  decoder_layers=3,
  dropout=0.0,
)
RELU = dataclasses.replace(
  GATED, gated=False, activation='relu', tied=True, scale_head=True
)

RNGS = {'params': jax.random.key(0), 'peft': jax.random.key(1)}

# At a kernel with heads and one without: at every site, compiling takes longer.
_AT = "targets='*/q|*/wo'"
# Every method of the registry, every router, and two adapters together.
METHODS = (
  'lora(rank=3)',
  f'lora(rank=3, {_AT})',
  f"lora(rank=4, init_weights='pissa', {_AT})",
  'dora(rank=3)',
  f'dora(rank=3, {_AT})',
  f'adalora(rank=3, target_rank=2, {_AT})',
  'ia3',
  'vera(rank=3)',
  'bitfit',
  'ln_tuning',
  'mov(experts=3)',
  "mov(experts=3, reads='output')",
  "mov(experts=3, reads='input')",
  'mov(experts=3, router=topk(k=2, renormalize=True))',
  'molora(experts=3, rank=2)',
  'molora(experts=3, rank=2, router=topk(k=2))',
  f'molora(experts=3, rank=2, router=topk(k=2), {_AT})',
  'molora(experts=3, rank=2, router=uniform)',
  'molora(experts=3, rank=2, router=random(k=2))',
  "ia3(targets='*/k') + lora(rank=2, targets='*/k|*/wo')",
  "mixture(expert=lora(rank=2), experts=3, share='a')",
  "mixture(expert=lora(rank=2), experts=3, share='b', reads='output')",
  "mixture(expert=ia3(on='input'), experts=3, targets='*/k|*/wo')",
  'ffn_lora(rank=2)',
  'mixlora(experts=3, rank=2)',
  f'mola(rank=2, {_AT})',
  'hydralora(experts=3, rank=2)',
  f'adamole(experts=3, rank=2, {_AT})',
  f'flylora(experts=7, router=magnitude(k=2), {_AT})',
  f'arrow(experts=3, rank=2, router=arrow(k=2), {_AT})',
  f'phatgoose(experts=3, rank=2, router=phatgoose(k=2), {_AT})',
  'bottleneck(size=3)',
  f'moslora(rank=3, {_AT})',
  f'comol(experts=3, rank=2, dropout=0.0, {_AT})',
  "mixture(expert=bottleneck(size=3), experts=3, combine='parameters')",
  f'dynmole(experts=3, rank=2, {_AT})',
  f'ldmole(experts=3, rank=2, dropout=0.0, {_AT})',
  f'loramoe(experts=3, rank=2, dropout=0.0, {_AT})',
  f"moelora(experts=3, dropout=0.0, router=task(tasks=['a', 'b']), {_AT})",
  'smear(experts=3, size=2)',
  f"poly(experts=3, rank=2, router=poly(tasks=['a', 'b']), {_AT})",
  'hardrouted(experts=3, rank=2)',
  f"mhr(experts=3, rank=2, router=poly(tasks=['a', 'b'], splits=2), {_AT})",
  # Even weights: else its function is the base's on average only.
  f'goat(experts=3, rank=1, dropout=0.0, router=uniform, {_AT})',
  'molora(experts=3, rank=2, share_router=True)',
  'lily(experts=3, rank=2)',
  'mode(experts=3, rank=2)',
  'moa(experts=3, rank=2, size=3)',
  f'mixture(expert=[lora(rank=2), moslora(rank=2)], experts=3, {_AT})',
  'mixture(expert=[lora(rank=2), prefix(length=2)], experts=3)',
  'adamix(experts=3, size=2)',
  'hmora(experts=3, rank=2, dropout=0.0)',
  "tokens(new='3|5-7')",
  # The base's function where no placeholders stand; see
  # tests/peft/test_prompt_tuning.py.
  'prompt(length=2)',
  'p_tuning(length=2, hidden=4)',
  'prefix(length=2)',
  'prefix(length=2, hidden=4)',
  'mixture(expert=prefix(length=2), experts=3, router=topk(k=2))',
)
# One of each method, with each kind of router, for what takes long.
ONE_EACH = (
  f'lora(rank=3, {_AT})',
  f'dora(rank=3, {_AT})',
  'ia3',
  'mov(experts=3)',
  f'molora(experts=3, rank=2, router=topk(k=2), {_AT})',
)


# For what takes long even so: a plain method, and a mixture with a choice.
FEW = (ONE_EACH[0], ONE_EACH[-1])


def others_slow(values, quick=ONE_EACH):
  """The values as parameters of a test, slow but for those of `quick`.

  A value of several parameters is a tuple, whose first counts.
  """
  return [
    pytest.param(*v, marks=() if v[0] in quick else pytest.mark.slow)
    for v in ((v if isinstance(v, tuple) else (v,)) for v in values)
  ]


def batch(rows=3, s=7, t=5, vocab=37, seed=0):
  """Ids with padding at the ends of the rows, of all lengths from full to 3.

  Rows are of the tasks 1, 2, 1, ...
  """
  rng = np.random.default_rng(seed)
  lengths = np.maximum(s - np.arange(rows) * 2, 3)
  inputs_mask = np.arange(s)[None] < lengths[:, None]
  targets_mask = np.arange(t)[None] < np.maximum(lengths - 2, 2)[:, None]
  targets = rng.integers(2, vocab, (rows, t)) * targets_mask
  tasks = 1 + np.arange(rows, dtype=np.int32)[:, None] % 2
  # Put, as `jnp.asarray` compiles a program for each shape.
  return jax.device_put(
    {
      'inputs': rng.integers(2, vocab, (rows, s)) * inputs_mask,
      'decoder_inputs': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      'targets': targets,
      'inputs_mask': inputs_mask,
      'targets_mask': targets_mask,
      'inputs_tasks': tasks * inputs_mask,
      'targets_tasks': tasks * targets_mask,
    }
  )


def make(method, config=GATED, semantics='official', **options):
  """(model, built) of a method on a small model."""
  built = build(method, t5.sites(config), semantics)
  return t5.T5(config, built.adapter_map, **options), built


@functools.lru_cache(maxsize=64)
def jitted(model):
  """`model.apply`, compiled once for all tests that call an equal module."""
  return jax.jit(model.apply)


@functools.lru_cache(maxsize=64)
def variables(method, config=GATED, noise=0.0, semantics='official'):
  """Initialised 'params' and 'peft'; `noise` moves the latter off identity."""
  model, _ = make(method, config, semantics)
  peft = init_params(model, batch(), 1, params(config))['peft']
  if noise:
    peft = moved(peft, noise, 2)
  return {'params': params(config), 'peft': peft}


def moved(tree, by, seed):
  """The tree with normal noise of a standard deviation.

  Drawn and added by NumPy: JAX compiles three programs for each shape, and
  one more to take an array over by `jnp.asarray`.
  """
  rng = np.random.default_rng(seed)

  def move(leaf):
    leaf = np.asarray(leaf)
    noise = (by * rng.normal(size=leaf.shape)).astype(leaf.dtype)
    return jax.device_put(leaf + noise)

  return jax.tree.map(move, tree)


@functools.cache
def params(config=GATED):
  """The base's weights, without any method."""
  return init_params(t5.T5(config), batch(), 0)['params']


def unstack(tree):
  """layers on axis 0 -> layers_0, layers_1, ...: the form without scan.

  NumPy slices what is not traced: JAX would compile a program for each shape.
  """
  if not isinstance(tree, dict):
    return tree
  out = {}
  for key, value in tree.items():
    if key == 'layers':
      depth = len(jax.tree.leaves(value)[0])
      for i in range(depth):
        out[f'layers_{i}'] = jax.tree.map(lambda a, i=i: _at(a, i), value)
    else:
      out[key] = unstack(value)
  return out


def _at(array, i):
  if isinstance(array, jax.core.Tracer):
    return array[i]
  return jax.device_put(np.asarray(array)[i])
