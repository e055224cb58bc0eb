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
    size_option: the option that a pool of served adapters rounds up, so that
      adapters of other sizes share a program: 'rank', 'length' or ''.
    pooled_module: (adapter, name) -> the module that stands for the adapter in
      a pool of served adapters; None for the adapter itself.
    pooled_leaves: {array of that module: (arrays of the adapter at one layer,
      function from a shape [inputs, outputs] to the base's kernel, scale of
      the low-rank term) -> the array}, for what the adapter does not store.
    exact_identity: whether zeros (ones of a scale) give the base's output bit
      for bit.
    not_pooled: why it cannot be served beside other adapters, and what to do,
      as the end of a sentence.
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
  size_option: str = ''
  pooled_module: Callable | None = None
  pooled_leaves: Mapping[str, Callable] = dataclasses.field(
    default_factory=dict
  )
  exact_identity: bool = False
  not_pooled: str = ''
