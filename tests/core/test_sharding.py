# SPDX-License-Identifier: Apache-2.0
"""Rules spread arrays over devices; nothing that is computed changes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from moepeft.core import sharding
from moepeft.core.sharding import Layout
from moepeft.core.types import AXIS_NAMES, State
from moepeft.models import weight_mapping
from moepeft.training import state_sharding
from tests import ROOT

from ..contracts import sharded


def over(data, model, *rules):
  """A layout of devices that need not be there."""
  return Layout(AbstractMesh((data, model), sharding.AXES), rules)


def spec(letters, shape, *rules, data=4, model=2):
  layout = over(data, model, *rules)
  return sharding.spec(layout, [AXIS_NAMES[a] for a in letters], shape)


D, F, N = ('embed', 'data'), ('mlp', 'model'), ('heads', 'model')


def test_the_first_rule_whose_size_divides_takes_the_mesh_axis():
  assert spec('df', (12, 6), D, F) == P('data', 'model')
  # 3 does not divide by 2, so the next rule may have it.
  assert spec('nd', (3, 12), N, ('embed', 'model')) == P(None, 'model')
  assert spec('nd', (4, 12), N, ('embed', 'model')) == P('model')
  assert spec('d', (11,), D) == P()
  assert spec('er', (8, 8), D, F, N) == P()


def test_an_axis_of_both_kinds_is_used_once_an_array():
  assert spec('df', (12, 12), D, ('mlp', 'data')) == P('data')
  assert spec('d', (12,), D, ('embed', 'model')) == P('data')
  # Of two axes of a name the second where only that divides.
  assert spec('dd', (11, 12), D) == P(None, 'data')


def test_an_axis_of_one_device_spreads_nothing():
  assert spec('df', (12, 6), D, F, model=1) == P('data')
  assert spec('df', (12, 6), D, F, data=1, model=1) == P()


@pytest.mark.parametrize('axis', ['vocab', 'mlp', 'embed', 'heads'])
def test_presets_name_the_wide_axes(axis):
  presets = sharding.PRESETS
  assert presets['dp'] == ()
  assert (axis, 'data') in presets['fsdp']
  assert ((axis, 'model') in presets['tp']) == (axis != 'embed')


@pytest.mark.parametrize(
  ('kv_heads', 'expected'),
  [
    (4, P(None, None, 'model')),
    (2, P(None, None, 'model')),
    (3, P()),
    (1, P()),
  ],
)
def test_keys_of_grouped_queries_are_spread_where_they_divide(
  kv_heads, expected
):
  # l d k h of three layers, over two devices.
  rules = sharding.PRESETS['tp']
  assert spec('ldkh', (3, 16, kv_heads, 6), *rules) == expected
  assert spec('lkh', (3, kv_heads, 6), *rules) == P(*expected[1:])
  assert spec('ldnh', (3, 16, 8, 6), *rules) == P(None, None, 'model')


def test_rules_of_the_config_come_first_and_may_keep_an_axis_whole():
  layout = sharding.layout('tp', rules=[['experts', 'data'], ['mlp', None]])
  # As read from a config.json: lists.
  tp = (('vocab', 'model'), ('heads', 'model'), ('kv_heads', 'model'))
  assert layout.rules == (('experts', 'data'), *tp)


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'preset': 'ddp'}, "preset is one of dp, fsdp, tp; got 'ddp'"),
    ({'rules': [('q', 'data')]}, "'q' is no axis of an array; .* embed, heads"),
    ({'rules': [('f', 'data')]}, "the axis 'f' is named 'mlp' now"),
    ({'rules': [('mlp', 'rows')]}, "one of data, model, or None; got 'rows'"),
    ({'rules': ['mlp']}, "pairs like .*; got 'mlp'"),
    ({'rules': [('mlp', 'data', 1)]}, 'pairs like'),
    ({'rules': [3]}, 'pairs like .*; got 3'),
    # Whatever there is here, it is fewer.
    ({'model': 1024}, 'model_parallel_size=1024 does not divide .* devices'),
    ({'model': 0}, 'model_parallel_size=0 does not divide'),
  ],
)
def test_what_cannot_be_is_one_sentence(options, said):
  with pytest.raises(ValueError, match=f'^config.sharding.*{said}') as e:
    sharding.layout(**options)
  assert len(str(e.value).splitlines()) == 1


LOGICAL_AXES = {
  'params': {
    'q': {'kernel': P('layers', 'embed', 'mlp')},
    'head': P('embed', 'vocab'),
  },
  'peft': {},
}
SHAPES = {'q': {'kernel': (3, 8, 16)}, 'head': (8, 7)}


def state_of(optimizer, shapes=SHAPES):
  params = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  return State(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    trainable=params,
    frozen={},
    opt=jax.eval_shape(optimizer.init, params),
    rng=jax.eval_shape(lambda: jax.random.key(0)),
  )


def specs_of(layout, optimizer, **options):
  """{path: (shape, spec)} of the optimizer's arrays."""
  state = state_of(optimizer, **options)
  where = state_sharding.state_shardings(layout, state, LOGICAL_AXES, 'params')
  paths = jax.tree_util.tree_flatten_with_path(state.opt)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (leaf.shape, at)
    for (path, leaf), at in zip(
      paths, (at.spec for at in jax.tree.leaves(where.opt)), strict=True
    )
  }


def test_moments_lie_as_their_parameters():
  actual = specs_of(over(4, 2, D, F), optax.chain(optax.adamw(0.1)))
  moments = {k: v for k, v in actual.items() if k.endswith('kernel')}
  assert len(moments) == 2
  assert set(moments.values()) == {((3, 8, 16), P(None, 'data', 'model'))}
  heads = {at for k, (_, at) in actual.items() if k.endswith('head')}
  assert heads == {P('data')}
  # Counts.
  assert {at for _, (shape, at) in actual.items() if not shape} == {P()}


def test_factored_moments_lie_as_the_axes_that_are_left():
  adafactor = optax.adafactor(0.1, min_dim_size_to_factor=8)
  layout = over(4, 2, D, F)
  actual = specs_of(layout, adafactor)
  assert {v for k, v in actual.items() if k.endswith('q/kernel')} == {
    ((3, 8), P(None, 'data')),
    ((3, 16), P(None, 'model')),
    # The place of what is not factored.
    ((1,), P()),
  }
  # Of a square, sizes do not tell which axis is left.
  square = SHAPES | {'q': {'kernel': (3, 16, 16)}}
  actual = specs_of(layout, adafactor, shapes=square)
  rows = {v for k, v in actual.items() if k.endswith('q/kernel')}
  assert rows == {((3, 16), P()), ((1,), P())}


def test_one_line_says_what_each_device_holds_and_what_does_not_divide():
  layout = sharding.layout()
  state = state_of(optax.adam(0.1))
  said = state_sharding.describe(layout, state, LOGICAL_AXES, 'params')
  # 3 * 8 * 16 + 8 * 7 = 440 floats, 1760 bytes; Adam has two and a count.
  assert 'weights per device: 0.00176 of 0.00176 MB' in said
  assert 'optimizer per device: 0.00352 of 0.00352 MB' in said
  assert 'divide' not in said and '\n' not in said


def test_evaluation_rounds_rows_up_to_the_places_of_data():
  mesh = AbstractMesh((4, 2), sharding.AXES)
  assert [sharding.round_up(mesh, n) for n in (1, 4, 5)] == [4, 4, 8]


def start(module, *args, devices):
  flags = os.environ.get('XLA_FLAGS', '')
  env = os.environ | {
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}',
    'JAX_PLATFORMS': 'cpu',
  }
  command = [sys.executable, '-m', f'tests.contracts.{module}', *map(str, args)]
  return subprocess.Popen(
    command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
  )


def finish(*processes):
  for process in processes:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope='module')
def on_eight(tmp_path_factory):
  """(arrays, facts) of `sharded` on eight devices."""
  folder = tmp_path_factory.mktemp('sharded')
  path = folder / 'found.npz'
  finish(start('sharded', path, folder, devices=8))
  facts = json.loads(pathlib.Path(f'{path}.json').read_text())
  assert facts['devices'] == 8
  return np.load(path), facts


CASES = [case for case in sharded.CASES if case[1] != 'one']
cases = pytest.mark.parametrize(
  ('method', 'name'), CASES, ids=lambda v: 'mixture' if '(' in v else v
)


def close(found, expected, path=''):
  """Equal but for the order of float32 sums, relative to the whole tensor."""
  norm = np.linalg.norm(expected)
  assert np.linalg.norm(found - expected) <= 1e-5 * norm, path


@cases
@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_device(on_eight, method, name):
  arrays, _ = on_eight
  own = f'{method}|{name}|'
  mine = [key for key in arrays.files if key.startswith(own)]
  moved = 0
  for key in mine:
    expected = arrays[f'{method}|one|{key.removeprefix(own)}']
    close(arrays[key], expected, key)
    moved += 'gradient' in key and np.abs(expected).max() > 1e-4
  # A gradient for nearly every array.
  assert moved > 0.8 * sum('gradient' in key for key in mine)


# The share of an array that a device holds. v 40, d 16, f 24 divide by 8, n 4
# by 4; h 6 and what a mixture of vectors reads (h) by neither.
Q, WO = 'encoder/layers/self/q', 'decoder/layers/mlp/wo'
K = 'encoder/layers/self/k'
HELD = {
  'full|fsdp': {
    'embed/embedding': 1 / 8,
    'head/kernel': 1 / 8,
    f'{Q}/kernel': 1 / 8,
    f'{WO}/kernel': 1 / 8,
    'encoder/norm/scale': 1 / 8,
    'encoder/relpos/embedding': 1,
  },
  'full|tp2': {'embed/embedding': 1 / 2, f'{Q}/kernel': 1 / 2},
  'full|tp4': {
    'embed/embedding': 1 / 4,
    f'{Q}/kernel': 1 / 4,
    f'{WO}/kernel': 1 / 4,
    'encoder/norm/scale': 1,
    'encoder/relpos/embedding': 1 / 4,
  },
  f'{sharded.MIXTURE}|fsdp': {
    f'{Q}/kernel': 1 / 8,
    # l d e r and l e r n h; l n h e r is the same the other way round.
    f'{Q}/molora/a': 1 / 8,
    f'{Q}/molora/b': 1,
    f'{WO}/molora/a': 1 / 8,
    f'{WO}/molora/b': 1 / 8,
    # A router of d, one of h.
    f'{Q}/molora/router/kernel': 1 / 8,
    f'{K}/mov/router/kernel': 1,
  },
  f'{sharded.MIXTURE}|both': {
    # d over 4, and n, f or v over 2.
    'embed/embedding': 1 / 8,
    f'{Q}/kernel': 1 / 8,
    f'{Q}/molora/a': 1 / 4,
    f'{Q}/molora/b': 1 / 2,
    f'{K}/mov/scale': 1 / 2,
    f'{K}/mov/router/kernel': 1,
  },
}


@cases
@pytest.mark.slow
def test_a_device_holds_its_share_of_weights_and_optimizer(
  on_eight, method, name
):
  fact = on_eight[1][f'{method}|{name}']
  actual = fact['trainable'] | fact['frozen']
  for path, part in HELD[f'{method}|{name}'].items():
    assert actual[path] == pytest.approx(part), path
  assert fact['gradient'] == fact['trainable']


@cases
@pytest.mark.slow
def test_a_donated_step_leaves_every_array_where_it_was(on_eight, method, name):
  fact = on_eight[1][f'{method}|{name}']
  assert fact['same'] and fact['given']


@pytest.mark.slow
def test_what_a_rule_could_not_spread_is_told(on_eight):
  said = on_eight[1]['full|fsdp']['said']
  assert '8 x cpu (data 8, model 1)' in said
  assert 'does not divide: encoder/relpos/embedding (heads=4 by 8)' in said
  assert 'divide' not in on_eight[1]['full|tp4']['said']


@pytest.mark.parametrize('way', ['fsdp to one', 'one to tp2', 'tp2 to fsdp'])
@pytest.mark.slow
def test_a_checkpoint_goes_to_any_number_of_devices(on_eight, way):
  assert on_eight[1]['moved'][way]


@pytest.mark.slow
def test_rows_that_do_not_divide_are_refused(on_eight):
  assert on_eight[1]['refused'] == (
    'a batch of 7 rows does not divide by 4 devices; set config.batch_size to '
    'a multiple'
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dp', 'fsdp'])
def test_two_processes_with_their_own_rows_are_one(tmp_path, name):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  path = tmp_path / 'found.npz'
  finish(
    *(
      start('processes', i, 2, port, name, path, tmp_path / 'w', devices=2)
      for i in range(2)
    )
  )
  actual, expected = np.load(path), {}
  state = sharded.step('full', sharded.LAYOUTS['one'], expected, {})
  assert actual['shares'] == 2
  close(actual['loss'], expected['loss'])
  for key, array in weight_mapping.flatten(state.trainable).items():
    close(actual[f'trained/{key}'], np.asarray(array), key)
    # Saved by both, and read back by both.
    np.testing.assert_array_equal(
      actual[f'again/{key}'], actual[f'trained/{key}'], key
    )
