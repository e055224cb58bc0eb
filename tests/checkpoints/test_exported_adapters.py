# SPDX-License-Identifier: Apache-2.0
"""Adapters that version 0.1 exported load and compute what they did."""

import numpy as np
import pytest

from moepeft import config as config_lib
from moepeft.checkpoints import base
from moepeft.peft.prefix import placeholder_ids
from tests.invariants import bases

from . import exported_adapters

EXPECTED = np.load(exported_adapters.LOGITS)


@pytest.fixture(scope='module')
def t5_path(tmp_path_factory):
  return bases.write(tmp_path_factory.mktemp('models'))['t5']


@pytest.mark.parametrize('name', exported_adapters.CASES)
def test_logits_are_those_of_the_version_that_exported(name, t5_path):
  _, semantics, quantise = exported_adapters.CASES[name]
  path = str(exported_adapters.FOLDER / name)
  config = config_lib.default()
  config.model.path, config.model.quantize = t5_path, quantise
  frozen = base.load(config.model)
  config.method = base.load_adapter(path, frozen.config).method
  config.semantics = semantics
  model, built = base.module(frozen, config)
  variables = base.with_adapter(
    base.initialise(frozen, model, 0), built, path, frozen
  )
  prompt_ids = placeholder_ids(built.adapter_map, frozen.config.vocab)
  computed = exported_adapters.logits(model, variables, prompt_ids)
  # Other compiler options round otherwise, by a few units in the last place of
  # sums of about ten layers.
  np.testing.assert_allclose(computed, EXPECTED[name], rtol=1e-4, atol=2e-4)
  assert np.std(EXPECTED[name]) > 0.1


def test_adapters_change_what_the_base_computes():
  # Else the equality above would hold for a loader that drops them.
  names = list(exported_adapters.CASES)
  for name in names[1:]:
    assert np.max(np.abs(EXPECTED[name] - EXPECTED[names[0]])) > 0.1, name
