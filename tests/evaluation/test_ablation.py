# SPDX-License-Identifier: Apache-2.0
"""The cells of the ablation of routers, and the script that runs them."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from moepeft import registries
from moepeft.checkpoints import base as base_lib
from moepeft.checkpoints.count_parameters import count
from moepeft.config import check as config_check
from moepeft.moe import aux_losses
from tests import ROOT

CARDS = ROOT / 'configs'
SCRIPT = ROOT / 'scripts' / 'ablate_routers.sh'


def card(name):
  spec = importlib.util.spec_from_file_location('card', CARDS / name)
  module = importlib.util.module_from_spec(spec)
  # Where dataclasses look for the module of their annotations.
  sys.modules['card'] = module
  spec.loader.exec_module(module)
  return module


ROUTERS = card('ablate/routers.py')


@pytest.mark.parametrize('name', ROUTERS.CELLS)
def test_every_cell_is_a_config_whose_method_builds(name):
  c = ROUTERS.get_config(f'name={name}')
  config_check.check(c, registries.BY_KEY)
  aux_losses.auxiliary_loss({}, dict(c.router_losses))
  assert count(c)['peft'] > 0


def test_no_two_cells_are_one():
  made = set()
  for name in ROUTERS.CELLS:
    c = ROUTERS.get_config(f'name={name}')
    family, shape = base_lib.shape(c.model)
    _, built = base_lib.module(base_lib.Base(family, shape, None, '', ''), c)
    # As built, with what the semantics decides.
    made.add((built.method, c.router_losses.load_balance))
  assert len(made) == len(ROUTERS.CELLS)


def test_a_cell_differs_from_the_default_run_in_what_its_card_says():
  default = card('molora_t5.py').get_config()
  for name in ROUTERS.CELLS:
    c = ROUTERS.get_config(f'name={name}')
    for key in ('method', 'steps'):
      c[key] = default[key]
    c.router_losses.load_balance = 0.0
    c.evaluation.before, c.evaluation.tasks = True, 'A,B,C'
    assert c.to_json() == default.to_json(), name


# By (e, r): e r (in + out) + e in at each of a layer's sites, of widths d, nh
# and f. Attention has q, k and v (d, nh) and o (nh, d), the gated feed-forward
# wi_0 (d, f) and wo (f, d): where nh = d, 2 e r + e times 4 d or d + f.
SHAPES = {
  # d 128, nh 96: 10112 e r + 5280 e, and 10112 r of `dense`.
  'embedded': ({}, (457_280, 455_488, 461_760, 455_040)),
  'large': ({'path': '', 'family': 't5', 'size': 'large'}, (43_130_880,) * 4),
  'xl': ({'path': '', 'family': 't5', 'size': 'xl'}, (84_049_920,) * 4),
}


@pytest.mark.parametrize(
  'shape',
  [
    'embedded',
    *(pytest.param(s, marks=pytest.mark.slow) for s in ('large', 'xl')),
  ],
)
def test_budgets_of_2_10_and_30_experts_are_equal_routers_included(shape):
  model, expected = SHAPES[shape]
  actual = []
  for name in ('softmax', 'experts2', 'experts30', 'dense'):
    c = ROUTERS.get_config(f'name={name}')
    c.model.update(model)
    actual.append(count(c)['peft'])
  assert tuple(actual) == expected
  # DESIGN: equal parameters are within 1 %.
  assert all(abs(n / actual[0] - 1) < 0.01 for n in actual)


def test_an_unknown_cell_is_answered_with_the_cells():
  with pytest.raises(ValueError, match="no cell 'top3'; there are softmax,"):
    ROUTERS.get_config('name=top3')


def run(*args, **env):
  # The suite's own flags compile programs that are quick to make, not to run.
  remaining = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(
    ['bash', str(SCRIPT), *map(str, args)],
    env={**remaining, 'PYTHON': sys.executable, **env},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_the_script_is_bash_and_says_how_it_is_called():
  subprocess.run(['bash', '-n', str(SCRIPT)], check=True)
  done = run('--help')
  assert done.returncode == 0
  assert 'ablate_routers.sh [OUT] [--config.key=value ...]' in done.stdout
  assert 'set -euo' not in done.stdout


def test_the_script_refuses_a_wrong_cell_before_it_trains(tmp_path):
  done = run(tmp_path, CELLS='softmax top3')
  assert done.returncode == 2
  assert "there is no cell 'top3'" in done.stdout
  assert not any(tmp_path.iterdir())


@pytest.fixture
def told(tmp_path):
  """(a python that only tells how it was called, what it was told)."""
  log, stub = tmp_path / 'log', tmp_path / 'python'
  stub.write_text(
    '#!/usr/bin/env bash\n'
    # The card is asked in earnest.
    f'[[ $1 != -m ]] && exec {sys.executable} "$@"\n'
    f'echo "$*" >> {log}\n'
    '[[ "$*" != *train*batch_size=0* ]] || exit 3\n'
    # What training leaves.
    'for a; do [[ $a != --workdir=* ]] || mkdir -p "${a#*=}"; done\n'
  )
  stub.chmod(0o755)

  def lines():
    text = log.read_text() if log.exists() else ''
    log.unlink(missing_ok=True)
    return text.splitlines()

  return str(stub), lines


def test_the_script_trains_measures_and_tables_every_cell_and_seed(
  tmp_path, told
):
  python, lines = told
  done = run(
    tmp_path / 'out', '--config.steps=2', PYTHON=python, SEEDS='0 5', CELLS=''
  )
  assert done.returncode == 0, done.stdout
  *calls, table = lines()
  expected = []
  for seed in (0, 5):
    for name in ROUTERS.CELLS:
      folder = tmp_path / 'out' / f'{name}_seed{seed}'
      expected += [
        f'-m moepeft.train --config={CARDS}/ablate/routers.py:name={name} '
        f'--workdir={folder} --config.seed={seed} '
        '--config.evaluation.after=False --config.steps=2',
        f'-m moepeft.evaluate --workdir={folder}',
      ]
  assert calls == expected
  folders = [call.partition('--workdir=')[2] for call in expected[1::2]]
  assert table == f'-m moepeft.tables {" ".join(folders)} --routing'


def test_the_script_does_a_run_once_for_the_same_flags(tmp_path, told):
  python, lines = told
  same = {'PYTHON': python, 'CELLS': 'top1 dense'}
  run(tmp_path / 'out', '--config.steps=2', **same)
  assert len(lines()) == 2 * 2 + 1
  again = run(tmp_path / 'out', '--config.steps=2', **same)
  assert again.stdout.count('done before') == 2
  assert [line.split()[1] for line in lines()] == ['moepeft.tables']
  # moepeft.train is asked, which goes on or says what differs.
  run(tmp_path / 'out', '--config.steps=3', **same)
  assert len(lines()) == 2 * 2 + 1


def test_the_script_stops_at_a_run_that_fails_and_names_it(tmp_path, told):
  python, lines = told
  flag = '--config.batch_size=0'
  for _ in range(2):
    done = run(tmp_path / 'out', flag, PYTHON=python, CELLS='uniform dense')
    assert done.returncode == 3
    assert "the cell 'uniform' with seed 0 failed" in done.stdout
    # Neither measured nor taken for done; and the next is not begun.
    assert [line.split()[1] for line in lines()] == ['moepeft.train']


@pytest.mark.parametrize(
  'words, env, why',
  [
    # As "$OUT" is where it is not set.
    ([''], {}, 'OUT is empty'),
    (['out', 'softmax'], {}, "unexpected argument 'softmax'"),
    (['out', '--config.steps=2', 'x'], {}, "unexpected argument 'x'"),
    (['out', ''], {}, "unexpected argument ''"),
    (['--config.steps', '2'], {}, "unexpected argument '2'"),
    (['out'], {'SEEDS': '0 5 0'}, 'SEEDS has 0 more than once'),
    (['out'], {'CELLS': 'top1 top1'}, 'CELLS has top1 more than once'),
  ],
)
def test_the_script_refuses_what_it_would_train_in_vain(told, words, env, why):
  python, lines = told
  done = run(*words, PYTHON=python, **{'CELLS': 'dense', **env})
  assert done.returncode == 2
  assert f'error: {why}' in done.stdout
  assert not lines()


SMALL = (
  '--config.steps=2',
  '--config.log.every_steps=1',
  '--config.evaluation.max_examples=2',
)


@pytest.mark.slow
def test_the_script_trains_cells_once_and_prints_a_row_of_each(tmp_path):
  cells = {'CELLS': 'top1_balanced dense'}
  done = run(tmp_path, *SMALL, **cells)
  assert done.returncode == 0, done.stdout
  for name in cells['CELLS'].split():
    folder = tmp_path / f'{name}_seed0'
    config = json.loads((folder / 'config.json').read_text())
    expected = ROUTERS.CELLS[name]
    assert config['method'] == expected.method
    assert config['router_losses']['load_balance'] == expected.load_balance
    assert config['steps'] == 2
  table = [line for line in done.stdout.splitlines() if line.startswith('|')]
  assert any('topk' in row for row in table)
  # Of one row with a router there is no other to tell it from in the table.
  assert 'router_losses.load_balance differs: 0.01 (`molora' in done.stdout
  assert any('lora(rank=45' in row for row in table)
  again = run(tmp_path, *SMALL, **cells)
  assert again.stdout.count('done before') == 2
  assert 'compiling' not in again.stdout
  # What is printed last is the same table.
  assert [x for x in again.stdout.splitlines() if x.startswith('|')] == table
