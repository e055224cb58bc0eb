# SPDX-License-Identifier: Apache-2.0
"""The passes that benchmarks/passes.py counts operations to."""

import importlib
import sys

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
passes = importlib.import_module('passes')


@pytest.mark.parametrize(
  'path, expected',
  [
    ('jit(loss)/encoder/mlp/wi_0/lora/btd,df->btf/dot_general', 'products'),
    ('encoder/mlp/wi_0/lora/...i,io->...o/dot_general', 'adapter products'),
    ('encoder/mlp/wi_0/lora/to,ti->oi/dot_general', 'adapter products'),
    ('encoder/self/core/bnts,bsnh->btnh/dot_general', 'attention'),
    ('jit(loss)/decode/head/btd,dv->btv/dot_general', 'head and cross-entropy'),
    ('encoder/mlp/mlp/tanh', 'activation'),
    ('encoder/add', 'elementwise'),
  ],
)
def test_an_operation_is_counted_to_its_pass(path, expected):
  assert passes.pass_of(path, passes.OURS, 'elementwise') == expected
