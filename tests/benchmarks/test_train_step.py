# SPDX-License-Identifier: Apache-2.0
"""The compared sides of benchmarks/train_step.py, and their ratios."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepeft.core.types import Context
from moepeft.moe.routers.softmax import Softmax
from moepeft.nn.adapter_hook import BaseLayer
from moepeft.peft.methods.lora import Lora
from moepeft.peft.mixture import Mixture
from tests import ROOT

FILE = ROOT / 'benchmarks' / 'train_step.py'


def load():
  spec = importlib.util.spec_from_file_location('train_step', FILE)
  module = importlib.util.module_from_spec(spec)
  # Where dataclasses look for the module of their annotations.
  sys.modules['train_step'] = module
  spec.loader.exec_module(module)
  return module


STEP = load()

# (einsum, kernel's shape, letters inside, outside): into heads and out of them.
PROJECTIONS = {
  'query': ('btd,dnh->btnh', (7, 2, 3), 'd', 'nh'),
  'output': ('btnh,nhd->btd', (2, 3, 7), 'nh', 'd'),
  'gate': ('btd,df->btf', (7, 11), 'd', 'f'),
}


@pytest.mark.parametrize(
  'name',
  [
    'output',
    *(pytest.param(n, marks=pytest.mark.slow) for n in ('query', 'gate')),
  ],
)
def test_the_naive_side_is_the_same_function_with_the_same_gradients(name):
  eqn, shape, inside, outside = PROJECTIONS[name]
  keys = jax.random.split(jax.random.key(0), 4)
  kernel = jax.random.normal(keys[0], shape)
  x = jax.random.normal(keys[1], (2, 5, *shape[: len(inside)]))
  f = BaseLayer(
    lambda x: jnp.einsum(eqn, x, kernel), eqn, shape, inside, outside
  )
  candidate = Mixture(Lora(rank=2, alpha=5.0), experts=3, router=Softmax(3))
  naive = STEP._naive(candidate)
  assert type(naive) is STEP.Naive
  start = candidate.init(jax.random.key(0), f, x, Context())['peft']
  # b starts at zero, with which every mixture is the base.
  leaves, tree = jax.tree.flatten(start)
  drawn = [
    jax.random.normal(jax.random.fold_in(keys[2], i), leaf.shape)
    for i, leaf in enumerate(leaves)
  ]
  peft = jax.tree.unflatten(tree, drawn)
  seen = jax.random.normal(keys[3], f(x).shape)

  def loss(module):
    def total(peft, x):
      y = module.apply({'peft': peft}, f, x, Context())
      return jnp.sum(y * seen), y

    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(peft, x)

  (expected, y), (actual, z) = loss(candidate), loss(naive)
  # The term does something: else both were the base and equal.
  assert jnp.abs(y - f(x)).max() > 1
  # Sums of at most 100 float32 products of order 10, in another order.
  for a, b in zip(
    jax.tree.leaves((z, actual)), jax.tree.leaves((y, expected)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def sides(**memories):
  return {n: STEP.CompiledStep(lambda: None, m) for n, m in memories.items()}


def test_ratios_are_medians_of_a_rounds_ratios():
  # naive over molora by rounds: 3, 2, 1.5; the ratio of medians would be 1.5.
  times = {'naive': [3.0, 4.0, 6.0], 'molora': [1.0, 2.0, 4.0]}
  times['lora'] = [1.0, 1.0, 1.0]
  actual = STEP.ratios(sides(naive=900, molora=300, lora=7), times)
  assert actual == {
    'time_naive_over_molora': 2.0,
    # 1, 2, 4.
    'time_molora_over_lora_equal_rank': 2.0,
    'time_mov60_over_mov1': None,
    'time_peft_lora_over_lora': None,
    'memory_naive_over_molora': 3.0,
  }


def test_memory_that_is_not_told_has_no_ratio():
  times = {'naive': [3.0], 'molora': [2.0]}
  actual = STEP.ratios(sides(naive=9, molora=None), times)
  assert actual['memory_naive_over_molora'] is None
  assert actual['time_naive_over_molora'] == 1.5
  del times['molora']
  assert set(STEP.ratios(sides(naive=9), times).values()) == {None}


def test_the_table_is_over_molora_where_it_is_timed():
  times = {
    'lora': [1.0, 3.0, 1.0],
    'molora': [2.0, 2.0, 4.0],
    'peft': [8.0] * 3,
  }
  text = STEP.table(sides(lora=50, molora=200, peft=None), times)
  head, *rows = text.splitlines()
  assert head.split() == ['side', 'time', 'memory', 'over', 'molora']
  # Ratios of lora 0.5, 1.5, 0.25; of peft 4, 4, 2.
  assert rows[0].split()[:3] == ['lora', '0.50', '0.25']
  assert rows[1].split()[:3] == ['molora', '1.00', '1.00']
  assert rows[2].split() == ['peft', '4.00', '-', 'lora(rank=40)', 'of', 'peft']
  del times['molora']
  alone = STEP.table(sides(lora=50, peft=None), times)
  assert alone.splitlines()[0].endswith('over lora')


def test_without_peft_its_side_is_left_out_aloud(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'peft', None)
  assert STEP.make_peft() is None
  assert STEP.chosen([]) == list(STEP.SIDES)
  assert "'peft' needs" in capsys.readouterr().out
  assert STEP.chosen(['lora']) == ['lora']
  with pytest.raises(ValueError, match='needs .*peft, not installed'):
    STEP.chosen(['lora', 'peft'])


def test_every_side_is_timed_once_a_round_and_not_when_it_warms_up():
  calls = []
  made = {n: STEP.CompiledStep(lambda n=n: calls.append(n), None) for n in 'ab'}
  times = STEP.take_turns(made, 3)
  assert calls == ['a', 'b'] * 4
  assert [len(times[n]) for n in 'ab'] == [3, 3]


WRONG = {
  '--rounds=0': 'rounds',
  '--unroll=0': 'unroll',
  '--only=lora,no_such': "got 'no_such'",
  # What absl would take for a word on its own.
  '--only lora molora': "unexpected argument 'molora'",
  '--json=no_such_folder/x.json': 'make the folder',
  '--json=.': 'it is a folder',
}


@pytest.mark.parametrize(
  'flags',
  [
    pytest.param(flags, marks=pytest.mark.slow if i else ())
    for i, flags in enumerate(WRONG)
  ],
)
def test_a_wrong_flag_is_a_sentence_before_anything_is_timed(flags, tmp_path):
  done = subprocess.run(
    [sys.executable, str(FILE), *flags.split()],
    env={**os.environ, 'PYTHONPATH': str(FILE.parent.parent)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and WRONG[flags] in line
  assert not done.stdout
