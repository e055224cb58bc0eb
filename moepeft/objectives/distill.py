# SPDX-License-Identifier: Apache-2.0
"""Distillation: the divergence of the student from a teacher at every target.

Hinton et al., arXiv:1503.02531, with the teacher's distribution alone and no
labels: T^2 KL(p, q), where p and q are the softmaxes of teacher and student at
temperature T. The factor keeps the size of the gradients. The teacher is
config.preference.reference, such as the run of a mixture.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moepeft.core.ranges import Range, option
from moepeft.core.types import Array, Batch, Tree
from moepeft.nn.numerics import to_f32
from moepeft.objectives.cross_entropy import token_losses
from moepeft.objectives.objective import ObjectiveSpec, check_options


@dataclasses.dataclass(frozen=True)
class DistillSettings:
  """Settings of config.distill.

  Attributes:
    temperature: T; above 1, improbable tokens weigh more.

  Raises:
    ValueError: a value is out of range.
  """

  temperature: float = option(1.0, Range(0, 1_000, above=True))

  def __post_init__(self):
    check_options(self, 'distill')


def divergences(teacher: Array, student: Array, temperature: float) -> Array:
  """T^2 KL(p, q) of each token in nats: logits [b, t, v] twice -> [b, t]."""
  log_p, log_q = (
    jax.nn.log_softmax(to_f32(logits) / temperature, axis=-1)
    for logits in (teacher, student)
  )
  return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def loss_sums(
  apply: Callable,
  variables: Tree,
  batch: Batch,
  rngs: dict[str, Array] | None,
  settings: DistillSettings,
  reference: Callable[[Tree, Batch], Array],
) -> tuple[Array, dict[str, Tree]]:
  """Sums the divergences and statistics of the targets.

  Args:
    apply: the student's `apply`.
    variables, batch, rngs: as in `seq2seq.loss_sums`; the teacher gets no rngs.
    reference: the teacher, (variables, batch) -> logits [b, t, v].

  Returns:
    The sum, and aux as in `seq2seq.loss_sums`; its metric agreement is the
    share of targets whose most probable token is the teacher's.
  """
  logits, sown = apply(
    variables, batch, train=rngs is not None, rngs=rngs, mutable=['routing']
  )
  teacher = jax.lax.stop_gradient(reference(variables, batch))
  mask, targets = batch['targets_mask'], batch['targets']
  losses = divergences(teacher, logits, settings.temperature)
  best = jnp.argmax(logits, axis=-1)
  same = jnp.sum((best == jnp.argmax(teacher, axis=-1)) & mask)
  tokens = jnp.sum(mask)
  return jnp.sum(jnp.where(mask, losses, 0)), {
    'weight': tokens,
    'tokens': tokens,
    'nll': jnp.sum(jnp.where(mask, token_losses(logits, targets), 0)),
    'correct': jnp.sum((best == targets) & mask),
    'metrics': {'agreement': jnp.stack([same, tokens])},
    'routing': sown.get('routing', {}),
  }


DISTILL = ObjectiveSpec(
  loss_fn=loss_sums,
  settings=DistillSettings,
  section='distill',
  needs_reference=True,
  reference_output='logits',
)
