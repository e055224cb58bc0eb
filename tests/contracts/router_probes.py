# SPDX-License-Identifier: Apache-2.0
"""Routers that only tests use, one of each kind that the form has to hold."""

import contextlib

import flax.linen as nn
import jax.numpy as jnp

from moepeft.core.ranges import Range, Texts, option
from moepeft.core.types import Routing
from moepeft.moe import ROUTERS
from moepeft.moe.gate import EXPERTS, INIT, gate_logits, top_mask
from moepeft.moe.router import RouterLoss, RouterSpec
from moepeft.moe.router_state import router_state
from moepeft.moe.task_names import require_task_ids
from moepeft.nn.initializers import peft_param
from moepeft.nn.numerics import softmax


class Balanced(nn.Module):
  """Top-k by probability plus a bias that moves against the load.

  Source: Wang et al., arXiv:2408.15664 (auxiliary-loss-free balancing).
  """

  experts: int = option(1, EXPERTS)
  k: int = option(1, EXPERTS)
  rate: float = option(0.125, Range(0, 1))

  @nn.compact
  def __call__(self, x, ctx):
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    bias = router_state(self, 'bias', (self.experts,), 'e')
    logits = gate_logits(x, kernel)
    p = softmax(logits)
    weights = jnp.where(top_mask(p + bias, self.k), p, 0)
    return Routing(logits, weights, k=self.k)


def balance(router, state, sums):
  """bias + rate sign(mean load - load)."""
  mean = jnp.mean(sums.share, axis=-1, keepdims=True)
  return {'bias': state['bias'] + router.rate * jnp.sign(mean - sums.share)}


class Squared(nn.Module):
  """Softmax routing that reports the squares of its logits."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x, ctx):
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    logits = gate_logits(x, kernel)
    return Routing(logits, softmax(logits), aux={'square': logits**2})


def mean_square(sums):
  """The mean over tokens, experts and layers."""
  count = jnp.maximum(sums.count, 1)[..., None]
  return jnp.mean(sums.aux['square'] / count)


class PromptMean(nn.Module):
  """One routing for a text, by the mean over its prompt (SMEAR's pooling)."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x, ctx):
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    segments = ctx.segment_ids
    if segments is None:
      segments = jnp.ones(x.shape[:2], jnp.int32)
    prompt = ctx.prompt_mask & ctx.token_mask
    same = (segments[:, :, None] == segments[:, None, :]) & prompt[:, None]
    same = same.astype(jnp.float32)
    mean = jnp.einsum('bts,bsi->bti', same, x.astype(jnp.float32))
    mean /= jnp.maximum(jnp.sum(same, axis=-1, keepdims=True), 1)
    logits = gate_logits(mean, kernel)
    return Routing(logits, softmax(logits))


class TaskTable(nn.Module):
  """One routing for each task of a list, as in MOELoRA (arXiv:2310.18339)."""

  experts: int = option(1, EXPERTS)
  tasks: tuple[str, ...] = option((), Texts('tasks', "['cola', 'mrpc']"))

  @nn.compact
  def __call__(self, x, ctx):
    shape = (len(self.tasks) + 1, self.experts)
    # Row 0 is that of padding.
    table = peft_param(self, 'kernel', INIT, shape, 'ie')
    logits = table[require_task_ids(ctx)]
    return Routing(logits, softmax(logits))


class Future(nn.Module):
  """Routes by the mean over the whole row: what a decoder must not do."""

  experts: int = option(1, EXPERTS)

  @nn.compact
  def __call__(self, x, ctx):
    mean = jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape)
    kernel = peft_param(self, 'kernel', INIT, (x.shape[-1], self.experts), 'ie')
    logits = gate_logits(mean, kernel)
    return Routing(logits, softmax(logits))


ENTRIES = {
  'prompt_mean': RouterSpec(PromptMean, pools_prompt=True),
  'task_table': RouterSpec(TaskTable),
  'future': RouterSpec(Future, causal=False),
  'balanced': RouterSpec(Balanced, normalized=False, update=balance),
  'squared': RouterSpec(
    Squared, losses={'square': RouterLoss(mean_square, reads=('square',))}
  ),
}


@contextlib.contextmanager
def registered():
  """The routers are in ROUTERS within it."""
  for name, entry in ENTRIES.items():
    ROUTERS.register(name, entry)
  try:
    yield
  finally:
    for name in ENTRIES:
      del ROUTERS._entries[name]
