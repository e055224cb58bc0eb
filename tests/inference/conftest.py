# SPDX-License-Identifier: Apache-2.0
"""One engine for the tests that leave it as it was."""

import pytest

from . import engines


@pytest.fixture(scope='session')
def engine():
  """An engine of a small llama with adapters 'one', 'two' and 'broken'."""
  model, params, _ = engines.decoder()
  settings = engines.SETTINGS
  with engines.running(model, params, engines.banks(), settings) as actual:
    yield actual
    assert actual.drain(30) and engines.idle(actual), 'a test left something'
    assert not +actual._adapters.acquired, 'an adapter is still held'
