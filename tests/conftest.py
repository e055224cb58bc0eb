# SPDX-License-Identifier: Apache-2.0
"""Programs that several tests need are compiled once."""

import pathlib
import tempfile

import jax

# Kept for the machine's temporary life: a second run of the suite is faster.
_CACHE = pathlib.Path(tempfile.gettempdir()) / 'moepeft-tests-jax'

jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
