# SPDX-License-Identifier: Apache-2.0
"""What a family's Hugging Face files hold beside what its rules name."""

import dataclasses
import re
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names that are treated in a way of their own.

  Attributes:
    head, embedding: of the tensors that a tied model shares.
    prefix: of all names but the head's; absent from files of a model that was
      saved without its head.
    ignored: a pattern of the names of constants and duplicates.
    renamed: {what older files' names end with: what the rules' do}.
    parts: {field of the config: a tensor that says that it is so}, of parts
      that a model may be saved without.
  """

  head: str
  embedding: str
  prefix: str = ''
  ignored: str = r'(?!)'
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def known_as(self, found: Iterable[str]) -> dict[str, str]:
    """{the name in the rules: the name in the files}, less what is ignored."""
    found = list(found)
    bare = not any(name.startswith(self.prefix) for name in found)
    known = {
      self._now(
        self.prefix + name if bare and name != self.head else name
      ): name
      for name in found
    }
    return {
      name: there
      for name, there in known.items()
      if not re.fullmatch(self.ignored, name)
    }

  def _now(self, name: str) -> str:
    """What the rules call what an older file calls so."""
    for old, new in self.renamed.items():
      if name.endswith(old):
        return name.removesuffix(old) + new
    return name
