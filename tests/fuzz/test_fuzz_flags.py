# SPDX-License-Identifier: Apache-2.0
"""Drawn flags and config values of every command: a config or one sentence."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import ROOT

_DRIVER = pathlib.Path(__file__).with_name('flag_driver.py')
# Command lines of each command; those with a config are built by shapes, which
# takes a second or two where the config is right.
_COUNTS = {
  'train': 200,
  'count': 300,
  'data': 200,
  'ngrams': 100,
  'evaluate': 600,
  'generate': 800,
  'tokenizer': 600,
  'tables': 400,
}
_SEED = 0


@pytest.mark.slow
@pytest.mark.parametrize('name', _COUNTS)
def test_no_flag_or_value_is_a_traceback_or_a_hang(name):
  command = [sys.executable, str(_DRIVER), f'moepeft.{name}']
  done = subprocess.run(
    [*command, str(_SEED), str(_COUNTS[name])],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  actual = json.loads(done.stdout.splitlines()[-1])
  faults = actual.pop('faults')
  print(name, actual)
  assert faults == []
  # The values that are drawn are neither all wrong nor all right.
  assert actual['built'] > 0 and actual['refused'] > _COUNTS[name] / 4
  assert actual['built'] + actual['refused'] == _COUNTS[name]
