# SPDX-License-Identifier: Apache-2.0
"""The sandbox of the programs."""

import pytest


@pytest.fixture(scope='session')
def sandbox():
  pytest.importorskip('openai')
  from examples.or_agents import execution
  from moepeft.agent.sandbox import bubblewrap

  if why := bubblewrap.unavailable_reason():
    pytest.skip(f'no sandbox here: {why}')
  return execution.make_sandbox(seconds=60, memory_mb=2048)
