# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself at its start, and of its routers."""

import types

import jax
import jax.numpy as jnp

from moepeft import metrics
from moepeft.typing import State


def test_the_introduction_is_a_table_with_a_line_for_what_is_given(capsys):
  base = types.SimpleNamespace(path='/base', quantise='')
  built = types.SimpleNamespace(
    method='lora(rank=2)', semantics='paper', trainable='peft'
  )
  state = State(
    step=jnp.int32(0),
    trainable={'a': jnp.zeros((3, 5))},
    frozen={'w': jnp.zeros((100, 30))},
    opt=(),
    rng=jax.random.key(0),
  )
  more = {'weights per device': '1.3 GB', 'packing': ''}
  metrics.introduce(base, built, state, 'bytes', 'w', more)
  lines = capsys.readouterr().out.splitlines()
  # 15 of 3,000 parameters are half a percent.
  assert lines[:4] == [
    'method              lora(rank=2) (paper semantics)',
    'base                /base, 3,000 parameters',
    'trained             15 parameters (0.50 %)',
    'tokens              bytes',
  ]
  assert lines[5:] == [
    'weights per device  1.3 GB',
    'workdir             w',
  ]


def test_alarms_name_the_expert_that_holds_too_much():
  sites = {
    'a': {'load': [[0.5, 0.5], [0.05, 0.95]]},
    'b': {'load': [0.2, 0.8]},
    # One expert holds all of it, and must.
    'c': {'load': [[1.0]]},
  }
  (line,) = metrics.alarms(sites, 0.9)
  assert line.startswith('router alarm: a, layer 1: expert 1 holds 95% of')
