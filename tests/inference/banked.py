# SPDX-License-Identifier: Apache-2.0
"""Small bases with trained adapters of many methods beside them."""

import jax
import jax.numpy as jnp
import numpy as np

from moepeft.checkpoints import adapter
from moepeft.checkpoints.base import Base, example_batch
from moepeft.inference.adapters.stacking import row_tree
from moepeft.models import FAMILIES, weight_mapping
from moepeft.models.t5 import model as t5
from moepeft.nn.initializers import Constant, param_metadata
from moepeft.peft import METHODS, build

from ..contracts import small, small_decoders

# By the name that the tests load it under. 'small' has other sites than
# 'large', another scale and a smaller rank: both are of one form.
_AT = "targets='*/q|*/wo'"
ADAPTERS = {
  'large': "lora(rank=5, alpha=7.0, targets='*/q|*/o|*/wo')",
  'small': f'lora(rank=3, rslora=True, {_AT})',
  'up': "lora(rank=2, targets='*/up')",
  'dora': f'dora(rank=3, alpha=5.0, {_AT})',
  'ia3': 'ia3',
  'inputs': "ia3(on='input', targets='*/wo')",
  'mov': 'mov(experts=3)',
  'output': "mov(experts=3, reads='output', router=topk(k=1))",
  'molora': f'molora(experts=3, rank=2, alpha=3.0, dropout=0.1, {_AT})',
  'topk': f'molora(experts=3, rank=2, router=topk(k=2, jitter=0.1), {_AT})',
  'shared': f"mixture(expert=lora(rank=2), experts=3, share='a', {_AT})",
  'uniform': f'molora(experts=3, rank=2, router=uniform, {_AT})',
  'random': f'molora(experts=3, rank=2, router=random(k=2, seed=7), {_AT})',
  'ffn_lora': 'ffn_lora(rank=2, alpha=3.0)',
  'mixlora': 'mixlora(experts=3, rank=2)',
  'mola': f'mola(rank=2, {_AT})',
  'hydralora': 'hydralora(experts=3, rank=2)',
  'adamole': f'adamole(experts=3, rank=2, {_AT})',
  'flylora': f'flylora(experts=5, router=magnitude(k=2), {_AT})',
  'arrow': f'arrow(experts=3, rank=2, router=arrow(k=2), {_AT})',
  'phatgoose': f'phatgoose(experts=3, rank=2, {_AT})',
  'bottleneck': 'bottleneck(size=3)',
  'bottlenecks': "mixture(expert=bottleneck(size=3), experts=3, share='up')",
  'moslora': f'moslora(rank=3, {_AT})',
  'comol': f'comol(experts=3, rank=2, {_AT})',
  'dynmole': f'dynmole(experts=3, rank=2, {_AT})',
  'ldmole': f'ldmole(experts=3, rank=2, {_AT})',
  'loramoe': f'loramoe(experts=3, rank=2, {_AT})',
  # Their terms nearly cancel; with a scale of one they lose no more digits than
  # others.
  'pissa': f"lora(rank=3, alpha=3.0, init_weights='pissa', {_AT})",
  'goat': f'goat(experts=3, rank=2, alpha=2.0, {_AT})',
  'vera': f'vera(rank=3, seed=5, {_AT})',
  'bitfit': 'bitfit',
  'ln_tuning': 'ln_tuning',
  'prefix': 'prefix(length=3)',
  'adamix': 'adamix(experts=3, size=2)',
  'mode': f'mode(experts=3, rank=2, {_AT})',
  'lily': 'lily(experts=3, rank=2)',
  'hash': f'molora(experts=3, rank=2, router=hash(seed=3), {_AT})',
  'prefixes': 'mixture(expert=prefix(length=3), experts=3)',
  # Routed by the prompt, by the task, and by a first pass of the base.
  'smear': 'smear(experts=3, size=2)',
  'vectors': 'mov(experts=3, router=sentence)',
  'moelora': f"moelora(experts=3, router=task(tasks=['a', 'b']), {_AT})",
  'poly': f"poly(experts=3, rank=2, router=poly(tasks=['b', 'c']), {_AT})",
  'mhr': (
    "mhr(experts=3, rank=2, router=poly(tasks=['a', 'b'], splits=2), "
    "targets='*/q|*/wo')"
  ),
  'xlora': 'xlora(experts=3, rank=2)',
  'embedded': f"molora(reads='embedding', embedding_size=3, {_AT})",
  # Sites that share a router, and ranks of their own.
  'hmora': 'hmora(experts=3, rank=2)',
  'hardrouted': 'hardrouted(experts=3, rank=2)',
  'shares': "mov(experts=3, reads='input', share_router=True)",
  'moa': 'moa(experts=2, rank=2, size=3)',
  'ranks': f'molora(ranks=[3, 1, 2], alpha=5.0, {_AT})',
  'two': "ia3(targets='*/k') + lora(rank=2, targets='*/k|*/wo')",
}
# Gate and up have names of the family's.
ADAPTERS['up'] = ADAPTERS['up'].replace('*/up', '*/wi*')


def pooled_methods():
  """The methods that a pool serves."""
  return {name for name, method in METHODS.items() if not method.not_pooled}


def base_of(config):
  """A base of a small config, with weights."""
  if isinstance(config, t5.T5Config):
    params = small.params(config)
  else:
    params = small_decoders.make(config)[1]['params']
  params = jax.tree.map(np.asarray, params)
  family = FAMILIES[config.family]
  return Base(
    family, config, params, 'base', weight_mapping.content_hash(params)
  )


def model_of(base, adapter_map):
  return base.family.module(base.config, adapter_map)


def trained(base, method, seed=0, semantics='official', noise=0.2):
  """(built, tree): an adapter moved off where it starts."""
  built = build(method, base.family.sites(base.config), semantics)
  model = model_of(base, built.adapter_map)
  rng = np.random.default_rng((seed, 17))
  actual = {}
  for path, (shape, label) in param_metadata(model, example_batch()).items():
    # Scales are ones at first; DoRA's magnitude is of the base's size.
    one = label.initializer is None or label.initializer == Constant(1)
    actual[path] = np.float32(one + noise * rng.normal(size=shape))
  return built, weight_mapping.unflatten(actual)


def save(path, base, method, seed=0, semantics='official', noise=0.2):
  """Writes such an adapter in our form; (path, built, tree)."""
  built, tree = trained(base, method, seed, semantics, noise)
  card = adapter.describe(
    built.method,
    semantics,
    base.path,
    base.sha256,
    base.config.family,
    base.config,
    base.quantise,
  )
  adapter.save(path, tree, card)
  return str(path), built, tree


def batch_of(base):
  inputs = {'embeddings': np.ones((1, 1, 3), np.float32)}
  if isinstance(base.config, t5.T5Config):
    return small.batch(rows=1) | inputs
  batch = jax.tree.map(lambda a: a[:1], small_decoders.batch())
  # A prompt of three tokens.
  trained = np.arange(batch['inputs'].shape[1])[None] >= 2
  return batch | inputs | {'targets_mask': trained & batch['inputs_mask']}


def alone(base, built, tree, batch):
  """Logits of the adapter's own model, as the trainer computes them."""
  model = model_of(base, built.adapter_map)
  return jax.jit(model.apply)({'params': base.params, 'peft': tree}, batch)


def together(base, banks, names_, batch):
  """Logits of a batch of the same row under several adapters."""
  model = model_of(base, banks.adapter_map)
  slots = np.stack([banks.row(name) for name in names_])
  rows = jax.tree.map(lambda a: jnp.stack([a] * len(names_)), batch)

  @jax.jit
  def served(params, tree, slots, rows):
    def one(slots, row):
      peft = row_tree(tree, slots)
      return model.apply({'params': params, 'peft': peft}, row)

    return jax.vmap(one)(slots, rows)

  return served(base.params, banks.tree, jnp.asarray(slots), rows)
