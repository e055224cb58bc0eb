# SPDX-License-Identifier: Apache-2.0
"""Small programs are compiled quickly, and once for all tests."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

# Before JAX starts: compiling is most of the suite's time, running is none.
_QUICK = (
  '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
)
# Later versions end at a flag that they do not know.
if int(importlib.metadata.version('jaxlib').split('.')[1]) <= 10:
  _QUICK += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_QUICK}'.strip()
# In the environment, so that the commands which tests start share it. Kept for
# the machine's temporary life: a second run of the suite is faster.
_CACHE = pathlib.Path(tempfile.gettempdir()) / 'moepeft-tests-jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
# Programs carry no tracebacks, which take time to write.
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

# Tracing makes many objects and few circles: by default a sixth of the time
# goes into looking for those.
gc.set_threshold(200_000, 50, 100)

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.ci_tests import CI_FILES, CI_TESTS  # noqa: E402

# Every kernel of a program on CPU is mapped, and Linux lets a process have
# 65,530 areas (vm.max_map_count): beyond, compiling ends in a crash.
_AREAS = 30_000


# Files of minutes, begun first: at the end one worker would have them alone.
_LONG = frozenset(
  (
    'test_adapters',
    'test_command_line',
    'test_exact',
    'test_extending',
    'test_decoders',
    'test_evaluate',
    'test_generator',
    'test_inline',
    'test_loader',
    'test_router_kinds',
    'test_router_kinds_by_hand',
    'test_routers',
    'test_seqio',
    'test_train',
  )
)
# Folders of many files of a second, for the end: workers then end together.
_SHORT = ('core', 'metrics', 'runs')


def pytest_itemcollected(item):
  file, _, name = item.nodeid.partition('::')
  is_slow = item.get_closest_marker('slow')
  is_listed = name.startswith(CI_TESTS.get(file, ())) and not is_slow
  if is_listed or file in CI_FILES:
    item.add_marker(pytest.mark.ci)
    item.add_marker(pytest.mark.slow)


def pytest_collection_modifyitems(items):
  items.sort(
    key=lambda item: (
      item.path.stem not in _LONG,
      item.path.parent.name in _SHORT,
    )
  )


def pytest_collection_finish():
  # A collection of garbage walks through every object: a second for the
  # libraries' and those of earlier files, which are therefore left out.
  gc.freeze()


@pytest.fixture(autouse=True, scope='module')
def _programs_do_not_pile_up():
  """Forgets compiled programs once there are many: they are on the disk."""
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and len(maps.read_bytes().splitlines()) > _AREAS:
    gc.unfreeze()
    jax.clear_caches()
  gc.collect()
  gc.freeze()
