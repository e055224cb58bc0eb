# SPDX-License-Identifier: Apache-2.0
"""Tensor names in Hugging Face files that differ from the rules' names."""

import dataclasses
import re
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class TensorNames:
  """Tensor names of a family with a special treatment.

  Attributes:
    head, embedding: the tensors that a tied model shares.
    prefix: the prefix of all names except the head's; files of a model that was
      saved without its head lack it.
    ignored: a regular expression of the names of constants and duplicates.
    renamed: {suffix of a name in older files: suffix of the rule's name}.
    parts: {bool field of the config: tensor that exists if it is True}, for
      optional parts of a model.
  """

  head: str
  embedding: str
  prefix: str = ''
  ignored: str = r'(?!)'
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def in_rules(self, stored_names: Iterable[str]) -> dict[str, str]:
    """{name in the rules: name in the files}, without ignored names."""
    stored_names = list(stored_names)
    lacks_prefix = not any(
      name.startswith(self.prefix) for name in stored_names
    )
    names = {
      self._current_name(
        self.prefix + name if lacks_prefix and name != self.head else name
      ): name
      for name in stored_names
    }
    return {
      name: stored_name
      for name, stored_name in names.items()
      if not re.fullmatch(self.ignored, name)
    }

  def _current_name(self, name: str) -> str:
    """The name in the rules of a name in an older file."""
    for old, new in self.renamed.items():
      if name.endswith(old):
        return name.removesuffix(old) + new
    return name
