# SPDX-License-Identifier: Apache-2.0
"""Training computes what it did when losses.json was recorded."""

import json

import numpy as np
import pytest

from . import bases, cases

# The cheapest; .ci/run has all.
QUICK = 'llama/prompt_tasks'
RECORDED = json.loads(cases.FILE.read_text())


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  return bases.write(tmp_path_factory.mktemp('models'))


def test_every_case_is_recorded():
  assert RECORDED.keys() == cases.CASES.keys()


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name == QUICK else pytest.mark.slow)
    for name in cases.CASES
  ],
)
def test_losses_and_gradient_norms_are_those_recorded(name, models, tmp_path):
  computed = cases.run(name, models, str(tmp_path / 'run'))
  for key, recorded in RECORDED[name].items():
    np.testing.assert_allclose(
      computed[key], recorded, rtol=cases.TOLERANCE[key], err_msg=key
    )
