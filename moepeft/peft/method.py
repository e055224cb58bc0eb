# SPDX-License-Identifier: Apache-2.0
"""An entry of METHODS: an adapter's module and the facts about it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from moepeft.core.ranges import Choices, IntegerList, Range, Texts
from moepeft.moe import DEFAULT_ROUTER


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of a method or router.

  Attributes:
    default: its value where a method string does not give one.
    allowed: the values that it may take, beside the default's type.
    training_only: whether it changes training alone, not the function.
  """

  default: Any
  allowed: Range | Choices | IntegerList | Texts | None = None
  training_only: bool = False


def options_of(module: type[nn.Module] | None) -> dict[str, Option]:
  """The options that a module's fields declare; None has none."""
  return {
    field.name: Option(
      field.default,
      field.metadata.get('allowed'),
      field.metadata.get('training_only', False),
    )
    for field in (dataclasses.fields(module) if module else ())
    if field.name not in ('parent', 'name')
  }


@dataclasses.dataclass(frozen=True)
class Exclusion:
  """Two groups of options, of which a method has one in use at most.

  An option is in use where its value is not the default of the module that
  declares it, and 'name=value' where it has that value.

  Attributes:
    first, second: the two groups.
    message: the error, with {first} and {second} for the two options in use,
      and {value} for the value of the second.
  """

  first: tuple[str, ...]
  second: tuple[str, ...]
  message: str

  def error(
    self, values: Mapping[str, Any], unused: Mapping[str, Any]
  ) -> str | None:
    """The message where both groups have an option in use, else None.

    Args:
      values: {option: value} of all options of a method.
      unused: {option: its value where it is not in use}.
    """

    def in_use(option: str) -> bool:
      name, _, value = option.partition('=')
      if name not in values:
        return False
      return values[name] == value if value else values[name] != unused[name]

    names = [
      next((o.partition('=')[0] for o in group if in_use(o)), None)
      for group in (self.first, self.second)
    ]
    if None in names:
      return None
    first, second = names
    value = repr(values[second])
    return self.message.format(first=first, second=second, value=value)


@dataclasses.dataclass(frozen=True)
class Method:
  """An entry of METHODS.

  Attributes:
    module: the adapter's Flax module; its fields are the options. None for
      full fine-tuning.
    roles: {semantics: roles of the sites that it adapts by default}.
    defaults: {semantics: options that differ between the two}.
    expert: of a mixture, the entry whose adapter is its expert; the expert's
      options are then options of the mixture too.
    values: {option: default}, where it is not the module's.
    router: of a mixture, the router of a text that names none.
    additive: whether it adds a term to the base's output, so that a term of
      zero leaves that output as it is, in a mixture with any weights too.
    any_weights: whether its experts take weights of any sum, so that experts of
      other kinds can have the rest; every additive one does.
    shareable: parameters that the experts of a mixture may have in common.
    combine: values of the mixture's option `combine` that it has.
    columns: whether its mixtures can weight each column of the rank apart, and
      have experts of different ranks.
    dispatches: whether its mixtures can sort tokens by expert (`Mixing.slots`).
    merge: (variables, weight, adapter=..., eqn=...) -> weight, or None.
    merges_into: the name of that weight, 'kernel', 'scale' or 'bias'.
    merge_bias: (variables, bias, adapter=...) -> bias; None leaves it alone.
    innermost: whether the merge holds only where no adapter is inside of it.
    exclusions: its options that exclude one another.
    check: {option: value} -> None, raises a ValueError for values that the
      others rule out in another way; None where none do.
    replaces: sites below its own that it computes itself, so that no adapter
      can be there.
    once: whether no other method with this fact can stand beside it.
    why_not: why there is no merge, as the end of a sentence.
    initial_change: why it is not the base's function at first; '' if it is.
    fold: (spec, arrays of one site or of a stack of them) -> (spec, arrays) of
      the same function without what only training needs; None if all is needed.
    size_option: the option that a pool of served adapters rounds up, so that
      adapters of other sizes share a program: 'rank', 'length' or ''.
    pooled_module: (adapter, name) -> the module that stands for the adapter in
      a pool of served adapters; None for the adapter itself.
    pooled_leaves: {array of that module: (arrays of the adapter at one layer,
      function from a shape [inputs, outputs] to the base's kernel, scale of
      the low-rank term) -> the array}, for what the adapter does not store.
    scaled_leaves: arrays that the scale alpha / r is multiplied into there.
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
  expert: 'Method | None' = None
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  router: str = DEFAULT_ROUTER
  additive: bool = False
  any_weights: bool = False
  shareable: tuple[str, ...] = ()
  combine: tuple[str, ...] = ('outputs',)
  columns: bool = False
  dispatches: bool = False
  merge: Callable | None = None
  merges_into: str = 'kernel'
  merge_bias: Callable | None = None
  innermost: bool = False
  exclusions: tuple[Exclusion, ...] = ()
  check: Callable[[Mapping[str, Any]], None] | None = None
  replaces: tuple[str, ...] = ()
  once: bool = False
  why_not: str = ''
  initial_change: str = ''
  fold: Callable | None = None
  size_option: str = ''
  pooled_module: Callable | None = None
  pooled_leaves: Mapping[str, Callable] = dataclasses.field(
    default_factory=dict
  )
  scaled_leaves: tuple[str, ...] = ('b',)
  exact_identity: bool = False
  not_pooled: str = ''

  def options(self) -> dict[str, Option]:
    """{name: option}, those of a mixture's expert among them."""
    options = options_of(self.module)
    if self.expert:
      del options['expert']
      share = options.pop('share')
      if self.expert.shareable:
        allowed = Choices(('', *self.expert.shareable))
        options['share'] = dataclasses.replace(share, allowed=allowed)
      allowed = Choices(self.expert.combine)
      options['combine'] = dataclasses.replace(
        options['combine'], allowed=allowed
      )
      if not self.expert.dispatches:
        del options['dispatch']
      if not self.expert.columns:
        del options['by_column'], options['ranks']
      if not self.expert.additive:
        del options['shared_experts'], options['identity_experts']
      options |= self.expert.options()
    return {
      name: dataclasses.replace(
        option, default=self.values.get(name, option.default)
      )
      for name, option in options.items()
    }

  @property
  def module_defaults(self) -> dict[str, Any]:
    """{option: default of the module that declares it}."""
    defaults = {k: o.default for k, o in options_of(self.module).items()}
    return defaults | (self.expert.module_defaults if self.expert else {})

  def make(self, name: str | None = None, **options: Any) -> nn.Module:
    """The unbound adapter; `options` are checked before, routers are modules.

    Args:
      name: its entry in the 'peft' tree.
    """
    options = {**self.values, **options}
    if self.expert:
      mixture_options = options_of(self.module)
      inner = {k: v for k, v in options.items() if k not in mixture_options}
      options = {k: v for k, v in options.items() if k in mixture_options}
      options['expert'] = self.expert.make(**inner)
    return self.module(name=name, parent=None, **options)
