# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself at its start, and of its routers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Routing, State
from moepeft.moe import router_stats
from moepeft.runs import diagnosis
from moepeft.training import summary as training_summary


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
  training_summary.introduce(base, built, state, 'bytes', 'w', more)
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


def test_a_collapsed_router_is_named_with_its_expert():
  sites = {
    'dense': {
      'weight': [[0.5, 0.5], [0.05, 0.95]],
      # ln 2 is 0.693; the second layer has 0.1 / 0.693 = 0.14 of it.
      'weight_entropy': [0.69, 0.1],
    },
    'sparse': {'tokens': [0.97, 0.02, 0.01], 'weight_entropy': 0.0},
    'below': {'tokens': [0.2, 0.8], 'weight_entropy': 0.0},
    # One expert has all of it, and must.
    'single': {'weight': [[1.0]], 'weight_entropy': [0.0]},
  }
  lines = diagnosis.collapsed(sites, 0.9)
  assert list(lines) == ['dense, layer 1', 'sparse, layer 0']
  assert lines['dense, layer 1'].startswith('expert 1 has 95% of the weight')
  assert '0.14 of ln 2' in lines['dense, layer 1']
  assert lines['sparse, layer 0'].startswith('expert 0 gets 97% of the tokens')


def test_a_dense_router_with_one_expert_ahead_by_little_is_not_collapsed():
  # Of 100 tokens, 97 weight expert 2 the most: by a hundredth.
  ahead = np.tile([0.2475, 0.2475, 0.2575, 0.2475], (97, 1))
  other = np.tile([0.2575, 0.2475, 0.2475, 0.2475], (3, 1))
  weights = jnp.asarray(np.concatenate([ahead, other])[None], jnp.float32)
  sums = router_stats.router_stats(Routing(jnp.log(weights), weights), None)
  (site,) = training_summary.routing({'q': sums}).values()
  # 0.97 * 0.2575 + 0.03 * 0.2475
  assert site['weight'][2] == pytest.approx(0.2572)
  assert 'tokens' not in site and 'load' not in site
  assert site['weight_entropy'] / np.log(4) > 0.98
  # An alarm at a share of weight that any router has, were it not for entropy.
  assert diagnosis.collapsed({'q': site}, 0.25) == {}
