# SPDX-License-Identifier: Apache-2.0
"""Small programs are compiled quickly, and once for all tests."""

import os
import pathlib
import tempfile

# Before JAX starts: compiling is most of the suite's time, running is none.
_QUICK = '--xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_QUICK}'.strip()

import jax  # noqa: E402

# Kept for the machine's temporary life: a second run of the suite is faster.
_CACHE = pathlib.Path(tempfile.gettempdir()) / 'moepeft-tests-jax'

jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
