# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a compiled step, over those of a baseline."""

import itertools
import json

import pytest

from moepeft import config as config_lib
from moepeft.evaluation import step_cost
from moepeft.evaluation.step_cost import CompiledStep, take_turns

from .. import commands


def test_sides_take_turns_and_the_first_is_not_timed(monkeypatch):
  order = []
  # A step of the first side takes one second, of the second two; the steps that
  # are not timed only begin.
  steps = itertools.chain([0, 0], itertools.cycle([0, 1, 0, 2]))
  now = itertools.accumulate(steps)
  monkeypatch.setattr(step_cost.time, 'perf_counter', lambda: next(now))
  sides = {
    name: CompiledStep(lambda n=name: order.append(n), 7) for name in 'ab'
  }
  assert take_turns(sides, 2) == {'a': [1, 1], 'b': [2, 2]}
  assert order == ['a', 'b'] * 3


def test_ratios_are_medians_over_rounds(monkeypatch):
  sides = {
    'lora(rank=8)': CompiledStep(None, 300),
    'lora': CompiledStep(None, 200),
  }
  monkeypatch.setattr(
    step_cost, 'compile_step', lambda config: sides[config.method]
  )
  # 1, 3 and 2.
  times = {'step': [1.0, 6.0, 4.0], 'reference': [1.0, 2.0, 2.0]}
  monkeypatch.setattr(step_cost, 'take_turns', lambda sides, rounds: times)
  config = config_lib.default()
  config.method = 'lora(rank=8)'
  assert step_cost.measure(config, 'lora', 3) == {
    'baseline': 'lora',
    'step_time': 2.0,
    'memory': 1.5,
    'memory_megabytes': 0.0,
  }


@pytest.mark.slow
def test_count_measures_a_step():
  result = commands.run(
    'moepeft.count',
    *('--measure', '--rounds=1', '--baseline=lora(rank=1)', '--noflops'),
    *('--config.model.path=', '--config.model.family=llama'),
    *('--config.model.size=tiny', '--config.batch_size=2'),
    *('--config.method=molora(experts=2, rank=64)', '--config.data.length=16'),
  )
  measured = json.loads(result.stdout)['measured']
  assert measured['baseline'] == 'lora(rank=1)'
  # The gradients of 128 columns of rank are kept, and those of one.
  assert measured['memory'] > 1 and measured['memory_megabytes'] > 0
  assert measured['step_time'] > 0
