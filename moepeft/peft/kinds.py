# SPDX-License-Identifier: Apache-2.0
"""Several kinds of experts in one mixture.

mixture(expert=[lora(rank=4), bottleneck(size=8)], experts=2, router=sigmoid)
has two experts of each kind, and a router with four weights. Each kind stands
at sites of its own; a site has the experts of its kinds, with their weights.
Where sites differ, a layer has one router, that of its first site
(`share_routing`), as in MoA (arXiv:2506.05928).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from moepeft.config.method_string import Spec
from moepeft.core.types import Array, Context
from moepeft.nn.adapter_hook import BaseLayer, wrap
from moepeft.peft.method import Method, Option, options_of
from moepeft.peft.mixture import Mixture, can_be_expert


class Kind(nn.Module):
  """The experts of one kind, with their part of a mixture's weights.

  Parameters: those of the experts.

  Attributes:
    entry: its name in the 'peft' tree. Flax has names of its own for modules in
      a tuple, which depend on the site.
    expert: the adapter that each expert is, unbound.
    index: the position of the kind among those of the mixture.
    kinds: the number of kinds.
  """

  entry: str
  expert: nn.Module
  index: int
  kinds: int

  @nn.compact
  def __call__(
    self, f: BaseLayer, x: Array, ctx: Context, mixing: Any
  ) -> Array:
    e = mixing.experts // self.kinds
    weights = mixing.weights()[..., self.index * e : (self.index + 1) * e]
    part = dataclasses.replace(
      mixing, experts=e, weights=lambda down=None: weights, k=None
    )
    return self.expert.mix(self, f, x, ctx, part)


class Kinds(nn.Module):
  """The kinds of experts at one site, the first innermost.

  Attributes:
    at_site: the kinds, unbound.
  """

  at_site: tuple[Kind, ...]

  @nn.nowrap
  def mix(
    self, module: nn.Module, f: BaseLayer, x: Array, ctx: Context, mixing: Any
  ) -> Array:
    """f(x) with the kinds around it, as adapters at one site nest.

    Parameters: those of each kind, below its name.
    """
    mixing = dataclasses.replace(mixing, dispatch='dense')
    for kind in self.at_site:
      bound = kind.clone(parent=module, _deep_clone=True, name=kind.entry)
      f = wrap(functools.partial(bound, mixing=mixing), f, ctx)
    return f(x)

  @nn.nowrap
  def only(self, indices: Sequence[int]) -> 'Kinds':
    """The kinds at these positions."""
    return self.clone(at_site=tuple(self.at_site[i] for i in indices))

  @property
  def frozen_arrays(self) -> tuple[str, ...]:
    """Regular expressions of arrays that stay as they were drawn."""
    return tuple(
      f'{kind.entry}/{arrays}'
      for kind in self.at_site
      for arrays in getattr(kind.expert, 'frozen_arrays', ())
    )

  @property
  def down_names(self) -> tuple[str, ...]:
    """The arrays of down-projections, which `Mixture.down_arrays` lists."""
    return tuple(
      f'{kind.entry}/{name}'
      for kind in self.at_site
      for name in getattr(kind.expert, 'down_names', ())
    )

  @property
  def tied_arrays(self) -> dict[str, int]:
    """{regular expression: groups} of arrays that layers have in common."""
    return {
      f'{kind.entry}/{arrays}': groups
      for kind in self.at_site
      for arrays, groups in getattr(kind.expert, 'tied_arrays', {}).items()
    }


@dataclasses.dataclass(frozen=True)
class KindEntry:
  """A kind of expert in a method string or a preset.

  Attributes:
    name: of the method in METHODS.
    method: its entry, whose `values` are the kind's options.
    targets: globs over site paths joined by '|'; '' for the method's roles.
  """

  name: str
  method: Method
  targets: str = ''


@dataclasses.dataclass(frozen=True)
class KindsMethod(Method):
  """The entry of a mixture's experts where they are of several kinds.

  Attributes:
    kinds: their entries.
    takes_options: whether the kinds' options are options of the mixture, each
      for all kinds that have it with the same default. So a preset has them.
  """

  kinds: tuple[KindEntry, ...] = ()
  takes_options: bool = False

  def options(self) -> dict[str, Option]:
    """{name: option} of the kinds."""
    options = {}
    for kind in self.kinds if self.takes_options else ():
      for name, option in kind.method.options().items():
        options.setdefault(name, []).append(option)
    return {
      name: alike[0]
      for name, alike in options.items()
      if all(option == alike[0] for option in alike)
    }

  def make(self, name: str | None = None, **options: Any) -> Kinds:
    """The unbound kinds; see `Method.make`."""
    at_site, counts = [], {}
    for index, kind in enumerate(self.kinds):
      declared = kind.method.options()
      values = {k: v for k, v in options.items() if k in declared}
      counts[kind.name] = number = counts.get(kind.name, 0) + 1
      at_site.append(
        Kind(
          f'{kind.name}_{number}' if number > 1 else kind.name,
          kind.method.make(**values),
          index,
          len(self.kinds),
          parent=None,
        )
      )
    return Kinds(tuple(at_site), name=name, parent=None)

  def specs(self, options: Mapping[str, Any]) -> tuple[Spec, ...]:
    """The kinds as a list in a method string, every option written.

    Args:
      options: {option: value} of the mixture.
    """
    specs = []
    for kind in self.kinds:
      declared = kind.method.options()
      values = {k: options.get(k, o.default) for k, o in declared.items()}
      values |= {'targets': kind.targets} if kind.targets else {}
      specs.append(Spec(kind.name, tuple(values.items())))
    return tuple(specs)


def kind_entry(
  name: str, method: Method, targets: str = '', **values: Any
) -> KindEntry:
  """The entry of a kind whose options have other defaults."""
  method = dataclasses.replace(method, values={**method.values, **values})
  return KindEntry(name, method, targets)


def can_be_kind(method: Method) -> bool:
  """Whether a method's experts can stand beside those of other kinds."""
  return can_be_expert(method) and (method.additive or method.any_weights)


def kinds_of(
  kinds: Sequence[KindEntry], takes_options: bool = False
) -> KindsMethod:
  """The entry of experts of several kinds."""
  changes = (kind.method.initial_change for kind in kinds)
  return KindsMethod(
    module=Kinds,
    roles={
      semantics: tuple(
        dict.fromkeys(r for k in kinds for r in k.method.roles[semantics])
      )
      for semantics in kinds[0].method.roles
    },
    check=functools.partial(check, kinds),
    initial_change=next(filter(None, changes), ''),
    kinds=tuple(kinds),
    takes_options=takes_options,
  )


def check(kinds: Sequence[KindEntry], options: Mapping[str, Any]) -> None:
  """Raises a ValueError for options that several kinds of experts rule out.

  Args:
    options: {option: value} of a mixture of them.
  """
  ruled_out = [n for n in ('experts_per_layer', 'from_adapters') if options[n]]
  ruled_out += ['reads'] if options['reads'] == 'down' else []
  of_kinds = []
  for kind in kinds:
    declared = kind.method.options()
    values = {k: options.get(k, o.default) for k, o in declared.items()}
    starts = values.get('init_weights', 'zero')
    ruled_out += [] if starts == 'zero' else ['init_weights']
    of_kinds.append((kind.method, {**options, **values}))
  if ruled_out:
    raise ValueError(
      'experts of several kinds are new ones that start at zero, as many in '
      'each layer, and have no down-projection in common; drop '
      f'{ruled_out[0]}'
    )
  of_mixture = {name: o.default for name, o in options_of(Mixture).items()}
  for method, values in of_kinds:
    unused = of_mixture | method.module_defaults
    errors = [e.error(values, unused) for e in method.exclusions]
    if any(errors):
      raise ValueError(next(filter(None, errors)))
    if method.check:
      method.check(values)
