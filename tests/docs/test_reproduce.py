# SPDX-License-Identifier: Apache-2.0
"""Figures of docs/reproduce.md are the paper's and the configs'."""

import importlib.util
import json
import re

import pytest

from moepeft.checkpoints.count_parameters import count
from tests import ROOT

PAPER = ROOT.parent / 'shared' / 'paper'
PAGE = (ROOT / 'docs' / 'reproduce.md').read_text(encoding='utf-8')
ROWS = [
  [cell.strip(' `') for cell in line.split('|')[1:-1]]
  for line in re.findall(r'^\| `t5_.*\|$', PAGE, re.M)
]
needs_paper = pytest.mark.skipif(
  not PAPER.exists(), reason=f'needs {PAPER}, which is not part of the project'
)


def number(cell):
  return None if cell == '-' else float(cell.replace(',', ''))


def config_of(text):
  name, _, values = text.partition(':')
  spec = importlib.util.spec_from_file_location('paper_config', ROOT / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(values)


@needs_paper
def test_averages_are_the_papers():
  tables = json.loads((PAPER / 'results.json').read_text())['tables']
  averages = {}
  for size, rows in tables.items():
    for row in rows:
      # Sanh et al.'s own T0 was not trained by the paper.
      if 'Sanh' not in row['name']:
        method = 'full' if row['name'].startswith('T0') else row['name']
        averages[size, method] = row['average']
  stated = {(row[0], row[2]): number(row[5]) for row in ROWS}
  assert stated == averages


@needs_paper
def test_parameters_are_the_released_codes():
  counts = json.loads((PAPER / 'parameter_counts.json').read_text())
  compared = 0
  for size, _, method, _, parameters, _ in ROWS:
    size = size.removeprefix('t5_')
    if method == 'full':
      expected = counts['base'][size]
    else:
      expected = counts['trainable_official'][size].get(method)
    if expected is not None:
      assert number(parameters) == expected
      compared += 1
  assert compared >= 20


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[3])
def test_config_has_the_rows_method_and_takes_model_and_data(row):
  separator = ',' if ':' in row[3] else ':'
  config = config_of(f'{row[3]}{separator}model=BASE,data=P3')
  assert config.method == row[2]
  assert f't5_{config.model.size}' == row[0]
  assert (config.model.path, config.data.path) == ('BASE', 'P3')


@pytest.mark.slow
@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[3])
def test_parameters_are_the_configs(row):
  assert count(config_of(row[3]))['peft'] == number(row[4])


def test_every_config_of_the_paper_is_named():
  configs = (ROOT / 'configs' / 'paper').glob('*.py')
  assert {c.name for c in configs} <= set(re.findall(r'\w+\.py', PAGE))


def operations(d, ffn, kind):
  """Operations for one packed row of 1,024 input and 256 target tokens.

  T5 1.1 has 24 layers a side; heads times their size is d. Keys and values of
  the cross attention see the input's tokens; the head, of 32,128 tokens, sees
  the target's.
  """
  encoder = 24 * (4 * d * d + 3 * d * ffn)
  cross = 24 * 2 * d * d
  decoder = 24 * (6 * d * d + 3 * d * ffn) + 32_128 * d
  weights = (encoder + cross) * 1024 + decoder * 256
  return {'adapter': 4, 'full': 6}[kind] * weights


def test_costs_follow_from_the_shapes():
  shapes = {'large': (1024, 2816), 'xl': (2048, 5120), 'xxl': (4096, 10_240)}
  rows = re.findall(
    r'^\| (large|xl|xxl) \| (adapter|full) \|(.*)\|$', PAGE, re.M
  )
  assert len(rows) == 6
  for size, kind, rest in rows:
    steps, batch, stated, hours = map(number, rest.split('|'))
    total = operations(*shapes[size], kind) * steps * batch
    assert f'{total:.1e}' == f'{stated:.1e}'
    assert round(total / 400e12 / 3600) == hours
