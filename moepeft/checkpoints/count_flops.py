# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a training step for each token, counted in the traced program.

The products of matrices are counted, two FLOPs for each pair of numbers, with
the layers of a scan; XLA's cost analysis counts the body of a scan once. What
is no product (activations, norms, softmaxes) is left out, and what no result
depends on. Nothing is compiled or allocated. A test compares the count with
that of XLA for the compiled program.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from moepeft.checkpoints import base as base_lib
from moepeft.core.types import Batch, Tree
from moepeft.models import (
  ModelFamily,
  decoder_only,
  encoder_only,
  weight_mapping,
)
from moepeft.moe import router_state
from moepeft.nn import initializers
from moepeft.peft import Built


def flops_per_token(
  config: ConfigDict, shape: Any = None
) -> dict[str, float] | None:
  """FLOPs of a step over the tokens of its batch; None if it is no decoder.

  Args:
    config: its batch_size and the lengths of its data say how many tokens are
      computed together, which attention and sparse mixtures depend on.
    shape: the base's, from `base.shape`; None looks it up.

  Returns:
    {'forward', 'backward'}; what remat computes again is in the second.
  """
  shape = shape or base_lib.shape(config.model)
  if encoder_only(shape[1]):
    return None
  loss, args, tokens = loss_of_shapes(config, shape)
  forward = products(loss, *args) / tokens
  step = products(jax.value_and_grad(loss), *args) / tokens
  return {'forward': forward, 'backward': step - forward}


def loss_of_shapes(
  config: ConfigDict, shape: tuple[ModelFamily, Any]
) -> tuple[Callable[..., jax.Array], tuple[Tree, Tree, Batch], int]:
  """(loss, the shapes of its arguments, the number of tokens) of a config.

  The loss is the sum of the logits. Its arguments are the trained arrays, the
  rest of them, and a batch.
  """
  family, model = shape
  base = base_lib.Base(family, model, None, '', '')
  module, built = base_lib.module(base, config)
  batch, tokens = batch_shapes(config, model, built)
  shapes = initializers.shapes(module, base_lib.example_batch())
  trained, _ = router_state.split(shapes[built.trainable], built.frozen_arrays)
  trained = weight_mapping.flatten(trained)
  rest = {
    f'{collection}/{path}': leaf
    for collection, tree in shapes.items()
    for path, leaf in weight_mapping.flatten(tree).items()
    if collection != built.trainable or path not in trained
  }

  def loss(trained: Tree, rest: Tree, batch: Batch) -> jax.Array:
    arrays = {f'{built.trainable}/{p}': a for p, a in trained.items()} | rest
    rngs = {name: jax.random.key(0) for name in ('dropout', 'router')}
    variables = weight_mapping.unflatten(arrays)
    return jnp.sum(module.apply(variables, batch, train=True, rngs=rngs))

  return loss, (trained, rest, batch), tokens


def products(function: Any, *args: Tree) -> int:
  """FLOPs of the products of matrices of a function of arrays or shapes."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _products(live)


def _products(jaxpr: Jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      sizes = equation.invars[0].aval.shape
      pairs = math.prod(sizes[axis] for axis in contracted)
      total += 2 * pairs * math.prod(equation.outvars[0].aval.shape)
      continue
    inner = [_products(sub) for sub in jaxprs_in_params(params)]
    if name == 'cond':
      total += max(inner)
    else:
      # The trips of a `while` are not known; none has a product.
      total += params.get('length', 1) * sum(inner)
  return total


def batch_shapes(
  config: ConfigDict, model: Any, built: Built
) -> tuple[Batch, int]:
  """(shapes of a microbatch without padding, the number of its tokens).

  Args:
    model: the base's config.
  """
  adapters = [adapter for _, adapter in built.adapter_map.entries]
  sizes = [getattr(adapter, 'embedding_size', 0) for adapter in adapters]
  embedding_size, is_decoder = max(sizes, default=0), decoder_only(model)
  rows = max(config.batch_size // config.gradient_accumulation_steps, 1)
  data = config.data
  inputs = (rows, data.length if is_decoder else data.inputs_length)
  targets = inputs if is_decoder else (rows, data.targets_length)
  batch = {}
  for side, size in (('inputs', inputs), ('targets', targets)):
    batch[side] = jax.ShapeDtypeStruct(size, jnp.int32)
    batch[f'{side}_tasks'] = jax.ShapeDtypeStruct(size, jnp.int32)
    batch[f'{side}_mask'] = jax.ShapeDtypeStruct(size, bool)
  if embedding_size:
    batch['embeddings'] = jax.ShapeDtypeStruct(
      (rows, 1, embedding_size), jnp.float32
    )
  if is_decoder:
    return batch, math.prod(inputs)
  batch['decoder_inputs'] = batch['targets']
  return batch, math.prod(inputs) + math.prod(targets)
