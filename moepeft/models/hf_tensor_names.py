# SPDX-License-Identifier: Apache-2.0
"""Names in a family's Hugging Face files that its rules do not have."""

import dataclasses
import re
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class TensorNames:
  """Names that are treated in a way of their own.

  Attributes:
    head, embedding: of the tensors that a tied model shares.
    prefix: of all names but the head's; absent from files of a model that was
      saved without its head.
    ignored: a pattern of the names of constants and duplicates.
    renamed: {ending of a name in older files: ending of the rule's name}.
    parts: {field of the config: a tensor that is there where it is true}, of
      parts that a model may be saved without.
  """

  head: str
  embedding: str
  prefix: str = ''
  ignored: str = r'(?!)'
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def in_rules(self, stored_names: Iterable[str]) -> dict[str, str]:
    """{name in the rules: name in the files}, less those that are ignored."""
    stored_names = list(stored_names)
    bare = not any(name.startswith(self.prefix) for name in stored_names)
    names = {
      self._current(
        self.prefix + name if bare and name != self.head else name
      ): name
      for name in stored_names
    }
    return {
      name: stored
      for name, stored in names.items()
      if not re.fullmatch(self.ignored, name)
    }

  def _current(self, name: str) -> str:
    """The name in the rules of a tensor that an older file names so."""
    for old, new in self.renamed.items():
      if name.endswith(old):
        return name.removesuffix(old) + new
    return name
