# SPDX-License-Identifier: Apache-2.0
"""The points of benchmarks/scaling.py and their plot."""

import importlib
import sys

import pytest

from moepeft.models.decoder.model import sites
from moepeft.peft import build
from tests import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
scaling = importlib.import_module('scaling')


@pytest.mark.parametrize('series', ['molora', 'topk'])
def test_a_mixture_is_compared_with_a_lora_of_as_many_columns(series):
  *_, options = scaling.SERIES[series]
  assert {*options} <= {*scaling.DEFAULTS} == {*scaling.AXES}
  texts = scaling.texts(series, 'rank', 3)
  paths = sites(scaling.method_table.SHAPE)
  mixture, reference = (build(text, paths).method for text in texts)
  assert 'experts=10, rank=3' in mixture
  assert ('k=2' in mixture) == (series == 'topk')
  assert reference == 'lora(rank=30)'


def test_mov_is_compared_with_one_expert():
  assert scaling.texts('mov', 'experts', 5) == [
    'mov(experts=5)',
    'mov(experts=1)',
  ]


def test_a_panel_has_a_line_for_times_and_dashes_for_flops():
  points = [
    scaling.Point('molora', 'experts', 2, 1.1, 1.02),
    scaling.Point('molora', 'experts', 40, 1.3, 1.2),
    scaling.Point('mov', 'depth', 4, 1.2, 1.1),
  ]
  assert scaling.ratios(points)['flops_molora_experts_40'] == 1.2
  panels = dict(zip(scaling.AXES, scaling.draw(points).axes, strict=True))
  times, flops = panels['experts'].lines[:2]
  assert [*times.get_xdata()] == [*flops.get_xdata()] == [2, 40]
  assert [*times.get_ydata()] == [1.1, 1.3] and [*flops.get_ydata()] == [
    *(1.02, 1.2)
  ]
  assert [*panels['depth'].lines[0].get_ydata()] == [1.2]
  assert not panels['rank'].lines
