# SPDX-License-Identifier: Apache-2.0
"""The summary that a run prints at its start."""

import types

import jax
import jax.numpy as jnp

from moepeft.core.types import State
from moepeft.nn.expert_padding import PaddedAxis
from moepeft.training import summary


def test_the_summary_is_a_table_with_a_line_for_what_is_given(capsys):
  base = types.SimpleNamespace(path='/base', quantise='')
  method = types.SimpleNamespace(
    method='lora(rank=2)',
    semantics='paper',
    trainable='peft',
    frozen_arrays=(),
    tied_arrays={},
    unread_arrays={},
  )
  state = State(
    step=jnp.int32(0),
    trainable={'a': jnp.zeros((3, 5))},
    frozen={'w': jnp.zeros((100, 30))},
    opt=(),
    rng=jax.random.key(0),
  )
  more = {'weights per device': '1.3 GB', 'packing': ''}
  summary.print_summary(base, method, state, 'bytes', 'w', more)
  lines = capsys.readouterr().out.splitlines()
  # 15 of 3,000 parameters are half a percent.
  assert lines[:5] == [
    'method              lora(rank=2) (paper semantics)',
    'in full             lora(rank=2, alpha=16.0, rslora=False, dropout=0.0, '
    "a_init='normal', train_a=True, init_weights='zero', a_groups=0, "
    'b_groups=0)',
    'base                /base, 3,000 parameters',
    'trained             15 parameters (0.50 %)',
    'tokens              bytes',
  ]
  assert lines[6:] == [
    'weights per device  1.3 GB',
    'workdir             w',
  ]
  # The last of three layers has three experts of five.
  padded = {'a': PaddedAxis(1, (5, 5, 3), True)}
  summary.print_summary(base, method, state, 'bytes', 'w', padded=padded)
  lines = capsys.readouterr().out.splitlines()
  assert 'trained  13 parameters (0.43 %) and 2 zeros of padding' in lines
