# SPDX-License-Identifier: Apache-2.0
"""Small models with a soft prompt that is off where it starts."""

import dataclasses
import functools

import jax

from moepeft.models import FAMILIES
from moepeft.models.t5 import model as t5
from moepeft.peft import build

from .contracts import small, small_decoders

METHOD = 'prompt(length=3)'
# float32 sums of other order over a few layers.
CLOSE = dict(rtol=2e-5, atol=2e-5)
# Bytes need 259 ids.
T5 = dataclasses.replace(small.GATED, vocab=263)
LLAMA = dataclasses.replace(
  small_decoders.CONFIGS['llama'], vocab=263, length=127
)


def model_of(config, method=METHOD):
  family = FAMILIES[config.family]
  adapter_map = build(method, family.sites(config)).adapter_map
  return family.module(config, adapter_map)


@functools.cache
def made(config, method=METHOD, noise=0.3):
  """(model, variables), the prompt off the rows that it starts from."""
  if isinstance(config, t5.T5Config):
    return small.make(method, config)[0], small.variables(method, config, noise)
  return small_decoders.make(config, method, noise)


@functools.cache
def applied(model):
  return jax.jit(model.apply)
