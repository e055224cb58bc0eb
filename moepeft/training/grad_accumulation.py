# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: a batch in sequential parts, with less memory.

A loss is a function of sums over the batch, S = S_1 + ... + S_N. Its gradient
is the sum of the parts' J_i^T dL/dS, with dL/dS at the sums of the whole.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moepeft.core.types import Array, Batch, Tree
from moepeft.nn.numerics import to_f32

# (trainable, rows, rng) -> a dict of sums over these rows.
SumsFn = Callable[[Tree, Batch, Array], dict[str, Tree]]
# The sums of the whole batch -> the loss and metrics.
LossFn = Callable[[dict[str, Tree]], tuple[Array, dict[str, Tree]]]


def check(rows: int, parts: int) -> None:
  """Raises ValueError where a batch cannot be split."""
  if rows % parts:
    raise ValueError(
      f'config.batch_size {rows} does not divide by '
      'config.gradient_accumulation_steps '
      f'{parts}; set one of them so that all parts have as many rows'
    )


def gradient(
  sums_fn: SumsFn,
  loss_fn: LossFn,
  trainable: Tree,
  batch: Batch,
  rng: Array,
  parts: int,
  nonlinear: Sequence[str] = (),
) -> tuple[Tree, dict[str, Tree]]:
  """(the gradient of the loss, metrics) of a batch in equal parts.

  The gradient equals that of the whole batch, except for random noise: each
  part folds its number into the rng.

  Args:
    sums_fn: sums over some rows; one of them is 'total'.
    loss_fn: linear in 'total', with factors that depend on data only.
    nonlinear: keys of the other sums that the loss depends on. Their cotangents
      are known only after all parts, so the parts are then run twice, the first
      time without gradients.
  """
  if parts == 1:
    return jax.grad(lambda t: loss_fn(sums_fn(t, batch, rng)), has_aux=True)(
      trainable
    )
  numbered_parts = split(batch, parts), jnp.arange(parts)

  def run(trainable, x):
    rows, number = x
    return sums_fn(trainable, rows, jax.random.fold_in(rng, number))

  def cotangents(sums):
    loss_inputs = {key: sums[key] for key in ('total', *nonlinear)}
    return jax.grad(lambda linear: loss_fn(sums | linear)[0])(loss_inputs)

  if nonlinear:
    _, sums = jax.lax.scan(
      lambda _, x: (None, run(trainable, x)), None, numbered_parts
    )
    sums = _sum_parts(sums)
    grads, _ = _accumulate(run, trainable, numbered_parts, cotangents(sums))
  else:
    grads, sums = _accumulate(run, trainable, numbered_parts, {'total': 1.0})
    scale = cotangents(sums)['total']
    grads = jax.tree.map(lambda g: g * scale, grads)
  grads = jax.tree.map(lambda g, a: g.astype(a.dtype), grads, trainable)
  return grads, loss_fn(sums)[1]


def mapped(
  row_fn: Callable[[Batch, Array], dict[str, Array]],
  batch: Batch,
  rng: Array,
  parts: int,
) -> dict[str, Array]:
  """Arrays [b, ...] of a batch's rows, computed in equal parts; no gradient.

  Args:
    row_fn: (rows, rng) -> arrays of these rows.
  """
  if parts == 1:
    return row_fn(batch, rng)

  def run(_, x):
    rows, number = x
    return None, row_fn(rows, jax.random.fold_in(rng, number))

  xs = split(batch, parts), jnp.arange(parts)
  _, arrays = jax.lax.scan(run, None, xs)
  # The inverse of `split`.
  return jax.tree.map(
    lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), arrays
  )


def split(batch: Batch, parts: int) -> Batch:
  """[b, ...] -> [parts, b / parts, ...]; part i has rows i, i + parts, ...

  A device holds consecutive rows, so that with this stride every part has rows
  of each device (if b / parts is a multiple of the number of devices), and no
  rows are sent between devices.
  """
  return jax.tree.map(
    lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch
  )


def _accumulate(run, trainable, xs, cotangents) -> tuple[Tree, dict[str, Tree]]:
  """(gradient of the sum of cotangents * sums, the sums); float32."""

  def linear(trainable, x):
    sums = run(trainable, x)
    loss_inputs = {key: sums[key] for key in cotangents}
    products = jax.tree.map(
      lambda s, a: jnp.sum(s * a), cotangents, loss_inputs
    )
    return sum(jax.tree.leaves(products)), sums

  def add(total, x):
    part, sums = jax.grad(linear, has_aux=True)(trainable, x)
    return jax.tree.map(lambda a, b: a + to_f32(b), total, part), sums

  start = jax.tree.map(lambda a: jnp.zeros_like(to_f32(a)), trainable)
  total, sums = jax.lax.scan(add, start, xs)
  return total, _sum_parts(sums)


def _sum_parts(sums: Tree) -> Tree:
  return jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)
