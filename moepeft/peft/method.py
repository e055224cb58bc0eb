# SPDX-License-Identifier: Apache-2.0
"""An entry of the registry of methods: module, targets, defaults, merging."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
  """A line of the registry.

  Attributes:
    module: the adapter's Flax module; its fields are the options. None for
      full fine-tuning.
    roles: {semantics: roles of the sites that it adapts by default}.
    defaults: {semantics: options that differ between the two}.
    merge: (variables, kernel, adapter=..., eqn=...) -> kernel, or None.
    merge_bias: (variables, bias, adapter=...) -> bias; None leaves it alone.
    innermost: whether the merge holds only where no adapter is inside of it.
    once: whether it can stand only once in a method's text.
    why_not: why there is no merge, as the end of a sentence.
  """

  module: Any
  roles: Mapping[str, tuple[str, ...]]
  defaults: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  merge: Callable | None = None
  merge_bias: Callable | None = None
  innermost: bool = False
  once: bool = False
  why_not: str = ''
