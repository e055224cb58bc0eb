# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every form of models and adapters are read or refused."""

import json
import subprocess
import sys

import pytest

from tests import ROOT

_MUTATIONS = 300


@pytest.mark.slow
def test_damaged_files_are_read_or_refused_in_a_sentence():
  command = [sys.executable, '-m', 'tests.fuzz.formats', '0', str(_MUTATIONS)]
  run = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=3000
  )
  assert run.returncode == 0, run.stderr[-2000:]
  figures = json.loads(run.stdout.splitlines()[-1])
  for name, counts in figures.items():
    failed = len(counts['failed'])
    read, refused = counts.get('read', 0), counts.get('refused', 0)
    print(f'{name:20} read {read:5} refused {refused:5} failed {failed:3}')
  assert len(figures) >= 15
  assert {n: c['failed'][:3] for n, c in figures.items() if c['failed']} == {}
