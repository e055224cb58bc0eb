# SPDX-License-Identifier: Apache-2.0
"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), optax's implementation.

Weight decay is decoupled from the gradient and scaled by the learning rate.
"""

import optax

from moepeft.training.optimizers.spec import OptimizerSpec


def adamw(
  learning_rate: optax.Schedule, weight_decay: float, b1: float, b2: float
) -> optax.GradientTransformation:
  return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)


ADAMW = OptimizerSpec(adamw, keys=('b1', 'b2'))
