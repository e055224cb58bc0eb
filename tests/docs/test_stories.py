# SPDX-License-Identifier: Apache-2.0
"""Whole runs, as a user starts them: minutes each, so `pytest -m slow`."""

import json
import os
import subprocess
import sys

import pytest

from moepeft.runs import metrics_log
from tests import ROOT

SHARED = ROOT.parent / 'shared'
FLAN = SHARED / 'models' / 'flan-t5-small-int8'
P3 = SHARED / 'data' / 'p3' / 'train.jsonl.gz'

pytestmark = pytest.mark.slow


def train(workdir, *options, devices=1):
  """The summary of `python -m moepeft.train --config=configs/molora_t5.py`."""
  # The suite's own flags compile programs that are quick to make, not to run.
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  if devices > 1:
    env['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
  command = ['-m', 'moepeft.train', '--config=configs/molora_t5.py']
  subprocess.run(
    [sys.executable, *command, f'--workdir={workdir}', *options],
    cwd=ROOT,
    env=env,
    check=True,
  )
  return json.loads((workdir / 'summary.json').read_text())


@pytest.mark.parametrize(
  'method', ['molora(experts=10, rank=4)', 'lora(rank=45)']
)
def test_the_default_run_learns_group_b(method, tmp_path):
  summary = train(tmp_path, f'--config.method={method}')
  before, after = summary['before']['means'], summary['after']['means']
  # 400 examples each: a standard error of 0.025.
  assert after['B seen'] > before['B seen'] + 0.2
  assert after['B held_out'] > before['B held_out'] + 0.1


@pytest.mark.skipif(
  not (FLAN.exists() and P3.exists()),
  reason=f'needs {FLAN} and {P3}, which are not part of the project',
)
@pytest.mark.parametrize('method', ['molora(experts=10, rank=4)', 'mov'])
def test_a_real_model_learns_from_real_rows(method, tmp_path):
  summary = train(
    tmp_path,
    f'--config.method={method}',
    f'--config.model.path={FLAN}',
    '--config.data.source=jsonl',
    f'--config.data.path={P3}',
    '--config.data.temperature=inf',
    '--config.data.packing=True',
    '--config.data.inputs_length=256',
    '--config.data.targets_length=32',
    '--config.batch_size=8',
    '--config.steps=16',
    '--config.model.scan_unroll=1',
    '--config.evaluation.max_examples=4',
  )
  before, after = summary['before'], summary['after']
  assert after['validation_loss'] < before['validation_loss'] - 0.1


def test_a_run_goes_on_under_another_layout(tmp_path):
  options = (
    '--config.evaluation.before=False',
    '--config.evaluation.after=False',
    '--config.evaluation.every_steps=2',
    '--config.data.packing=True',
    '--config.batch_size=8',
    '--config.gradient_accumulation_steps=1',
  )

  def losses(name):
    return [
      row.get('loss', row.get('validation_loss'))
      for row in metrics_log.read(str(tmp_path / name / 'metrics.jsonl'))
    ]

  train(tmp_path / 'one', *options, '--config.steps=4')
  spread = ('--config.steps=2', '--config.sharding.preset=fsdp')
  train(tmp_path / 'many', *options, *spread, devices=8)
  split = (
    '--config.sharding.preset=tp',
    '--config.sharding.model_parallel_size=2',
  )
  train(tmp_path / 'many', *options, *split, '--config.steps=4', devices=8)
  # Four training losses and two validations; sums in other orders, and four
  # steps of Adam on what they differ by.
  assert len(losses('many')) == 6
  assert losses('many') == pytest.approx(losses('one'), rel=1e-3)


def test_the_benchmark_of_pages_prints_its_ratios():
  command = ['benchmarks/keep_pages.py', '--steps=2', '--rounds=1']
  completed = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
  )
  assert json.loads(completed.stdout).keys() == {
    f'{quantity}_without_over_with' for quantity in ('time', 'system', 'faults')
  }
