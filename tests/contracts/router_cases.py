# SPDX-License-Identifier: Apache-2.0
"""Every router with options and a context in which its facts show."""

import jax.numpy as jnp
import pytest

from moepeft.core.types import Context
from moepeft.moe import ROUTERS

# Options without which an entry's facts do not show.
OPTIONS = {
  'magnitude': {'k': 2},
  # Logits are near zero at first: of three, two experts reach the sum.
  'top_p': {'p': 0.5},
  # By default the near uniform probabilities take all experts.
  'entropy_adaptive': {'entropy_threshold': 1.0},
  # Larger logits, or no expert is below the threshold.
  'sparsegen': {'kernel_init': 'kaiming'},
  'task': {'tasks': ('a', 'b')},
  'poly': {'tasks': ('a', 'b')},
  # With more, each of three experts takes all of five tokens.
  'expert_choice': {'capacity_factor': 1.2},
}


def context(rows, tokens):
  """Prompts of three tokens, rows of two tasks in turn."""
  prompt = jnp.arange(tokens) < 3
  tasks = 1 + jnp.arange(rows)[:, None] % 2
  return Context(
    token_mask=jnp.ones((rows, tokens), bool),
    prompt_mask=jnp.broadcast_to(prompt, (rows, tokens)),
    task_ids=jnp.broadcast_to(tasks, (rows, tokens)),
    token_ids=7 * jnp.arange(rows)[:, None] + jnp.arange(tokens),
  )


def make(name, experts=3, **options):
  options = OPTIONS.get(name, {}) | options
  return ROUTERS[name].module(experts=experts, **options)


def crossed(*fast):
  """The names of all routers for `parametrize`, slow but for `fast`."""
  return [
    pytest.param(name, marks=() if name in fast else pytest.mark.slow)
    for name in ROUTERS
  ]
