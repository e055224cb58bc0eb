# SPDX-License-Identifier: Apache-2.0
import pytest

from .cases import CONFIGS


@pytest.fixture(params=CONFIGS)
def config(request):
  """Gated or not, tied or not."""
  return CONFIGS[request.param]
