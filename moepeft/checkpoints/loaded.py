# SPDX-License-Identifier: Apache-2.0
"""A base model that was read, whatever form it had."""

import dataclasses
from typing import Any

from moepeft.models.weight_mapping import Tree


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A base model in memory.

  Attributes:
    config: of its family, e.g. a T5Config.
    params: nested dict of NumPy arrays, layers on axis 0.
    sha256: content hash of what the files hold, whatever dtype was asked for;
      see `moepeft.models.weight_mapping.content_hash`.
    path: the directory or file that was read.
  """

  config: Any
  params: Tree
  sha256: str
  path: str
