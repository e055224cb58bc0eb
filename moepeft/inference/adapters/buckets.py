# SPDX-License-Identifier: Apache-2.0
"""Buckets: groups of adapters with the same method and shapes.

A bucket is a method whose rank is rounded up to 4, 8, 16, ... and whose scale
is one. Smaller ranks are padded with zeros, and alpha / r is multiplied into B.
The target modules are the method's default ones and those of the adapters named
at the start. An adapter without one of them has the identity there.

Some mixtures depend on their exact sites or sizes: sites that share a router,
experts of different ranks or of several kinds. The adapters of such a bucket
have all options in common.

Each method has one bucket, with the largest rank named. A bucket for each rank
would cost more, because every row reads its slot in every bucket.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from moepeft.checkpoints.adapter import method_instances
from moepeft.config import method_string
from moepeft.config.method_string import Spec
from moepeft.inference.adapters.served_modules import (
  check_decodes,
  served_module,
)
from moepeft.moe import ROUTERS
from moepeft.nn.adapter_hook import AdapterMap
from moepeft.peft import Built
from moepeft.peft.build import make_adapter, unique_name
from moepeft.peft.kinds import Kinds
from moepeft.peft.method import options_of
from moepeft.peft.method_text import (
  canonical_text,
  flatten_expert,
  method_entry,
  nest_expert,
)

_MIN_RANK = 4
# Options in which the adapters of a bucket may differ, beside the size.
_SLOT_OPTIONS = ('targets', 'rslora', 'alpha')


@dataclasses.dataclass(frozen=True)
class BucketPart:
  """One of the methods of a bucket.

  Attributes:
    name: the key in the 'peft' tree.
    kind: the flat spec (`peft.method_text`) without rank and scale; the whole
      spec where there are `modules`.
    rank: the largest rank, or soft prompt length, that fits; 0 for a method
      without either.
    sites: the paths of the target modules, in the model's order.
    modules: the adapters at the sites, for a mixture that depends on its exact
      sites or sizes; () for all others.
  """

  name: str
  kind: Spec
  rank: int
  sites: tuple[str, ...]
  modules: tuple[nn.Module, ...] = ()

  @property
  def spec(self) -> Spec:
    """The method with a scale of one, without target modules."""
    if not self.rank or size_option(self.kind) != 'rank':
      return self.sized
    spec = self.sized.replace(alpha=float(self.rank))
    # A preset may have it by default.
    return spec.replace(rslora=False) if _value(spec, 'rslora') else spec

  @property
  def sized(self) -> Spec:
    """The method with the bucket's rank, without target modules and scale."""
    if not self.rank:
      return self.kind
    return self.kind.replace(**{size_option(self.kind): self.rank})


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The method, rank and target modules that the adapters of a bucket share.

  Attributes:
    name: the key in the pool's tree.
    parts: the method, or several nested methods, innermost first.
  """

  name: str
  parts: tuple[BucketPart, ...]

  @property
  def method(self) -> str:
    """The method string that `--form` takes."""
    return method_string.format_method(
      tuple(nest_expert(part.sized) for part in self.parts)
    )

  def holds(self, other_bucket: 'Bucket') -> bool:
    """Whether the adapters of the other bucket fit into this one."""
    return _kinds(self.parts) == _kinds(other_bucket.parts) and all(
      part.rank >= other_part.rank and set(part.sites) >= set(other_part.sites)
      for part, other_part in zip(self.parts, other_bucket.parts, strict=True)
    )


def bucket_of(built: Built, label: str) -> Bucket:
  """Returns the smallest bucket of an adapter.

  Args:
    label: the adapter's name in error messages.

  Raises:
    ValueError: the method cannot be served from a pool.
  """
  parts = []
  for name, spec in method_instances(built.method).items():
    spec = flatten_expert(spec)
    if method_entry(spec).not_pooled:
      raise ValueError(
        f'{label} is {built.method!r}, which cannot be served beside other '
        f'adapters: {method_entry(spec).not_pooled}'
      )
    entries = built.adapter_map.entries
    for path, module in entries:
      check_decodes(module, path)
    modules = {path: module for path, module in entries if module.name == name}
    sites = tuple(modules)
    if any(map(_is_exact, modules.values())):
      part = BucketPart(name, _kind(spec, ()), 0, sites, (*modules.values(),))
    else:
      kind = _kind(spec, (*_SLOT_OPTIONS, size_option(spec)))
      part = BucketPart(name, kind, round_up_rank(rank_of(spec)), sites)
    parts.append(part)
  return Bucket('', tuple(parts))


def merge_buckets(
  required: Sequence[Bucket], sites: Mapping[str, str]
) -> tuple[Bucket, ...]:
  """Merges buckets of the same method; returns them sorted by name.

  Args:
    required: the smallest buckets of the adapters, from `bucket_of`.
    sites: {path: role} of the model's target modules.
  """
  merged: dict[tuple[Spec, ...], Bucket] = {}
  for bucket in required:
    key = _kinds(bucket.parts)
    merged[key] = _merge(merged.get(key, bucket), bucket, sites)
  named, used_names = [], set()
  for bucket in merged.values():
    methods = '_'.join(part.kind.name for part in bucket.parts)
    named.append(_rename_parts(bucket, unique_name(methods, used_names, '.')))
  return tuple(sorted(named, key=lambda bucket: bucket.name))


def adapter_map_of(buckets: Sequence[Bucket]) -> AdapterMap:
  """Returns the model's adapter map, with the modules of all buckets."""
  entries = []

  def depth(bucket: Bucket) -> int:
    # Inside of all others is what replaces a whole sublayer. Outside of them
    # are shared routers: sites share one if they read the same array, which an
    # adapter around them may change.
    if any(method_entry(part.kind).replaces for part in bucket.parts):
      return 0
    return 2 if any(part.modules for part in bucket.parts) else 1

  for bucket in sorted(buckets, key=depth):
    for part in bucket.parts:
      modules = part.modules or [make_adapter(part.spec, part.name)]
      served = [
        served_module(method_entry(part.kind), module, part.name)
        for module in modules
      ]
      entries += zip(
        part.sites, served * (len(part.sites) // len(served)), strict=True
      )
  return AdapterMap(tuple(entries))


def size_option(spec: Spec) -> str:
  """The option that is padded: 'rank', 'length', or '' for none."""
  return method_entry(spec).size_option


def rank_of(spec: Spec) -> int:
  """The rank, or a soft prompt's length; 0 for a method without either."""
  option = size_option(spec)
  return _value(spec, option) if option else 0


def scale_of(spec: Spec) -> float:
  """The scale of a method with a rank: alpha / r, or alpha / sqrt(r)."""
  rank = rank_of(spec)
  rslora = _value(spec, 'rslora')
  return _value(spec, 'alpha') / (rank**0.5 if rslora else rank)


def _value(spec: Spec, option: str) -> Any:
  """The option's value; None for a method without it."""
  declared = method_entry(spec).options().get(option)
  return spec.get(option, declared and declared.default)


def round_up_rank(rank: int) -> int:
  """Rounds a rank up to 4, 8, 16, ...; returns 0 for 0."""
  return max(_MIN_RANK, 1 << (rank - 1).bit_length()) if rank else 0


def _is_exact(adapter: nn.Module) -> bool:
  """Whether a mixture depends on its exact sites or sizes."""
  expert = getattr(adapter, 'expert', None)
  shares = getattr(adapter, 'shares_routing', False)
  return bool(
    shares or getattr(adapter, 'ranks', ()) or isinstance(expert, Kinds)
  )


def _kind(spec: Spec, slot_options: tuple[str, ...]) -> Spec:
  """The spec that all adapters of a bucket share, without default options.

  Args:
    slot_options: the options in which they may differ.
  """
  training_only = (
    k for k, o in method_entry(spec).options().items() if o.training_only
  )
  spec = _without(spec, (*slot_options, *training_only))
  router = spec.get('router')
  if isinstance(router, Spec):
    router_entry = ROUTERS[router.name]
    options = options_of(router_entry.module)
    training_only = (k for k, o in options.items() if o.training_only)
    router = _without(router, (*router_entry.pooled_options, *training_only))
    spec = spec.replace(router=router)
  kind = flatten_expert(
    method_string.parse(canonical_text(str(nest_expert(spec))))
  )
  router = kind.get('router')
  # A router without options is parsed as a string.
  return kind.replace(router=Spec(router)) if isinstance(router, str) else kind


def _without(spec: Spec, options: Sequence[str]) -> Spec:
  remaining = tuple((k, v) for k, v in spec.options if k not in options)
  return Spec(spec.name, remaining)


def _kinds(parts: Sequence[BucketPart]) -> tuple[Spec, ...]:
  return tuple(part.kind for part in parts)


def _merge(a: Bucket, b: Bucket, sites: Mapping[str, str]) -> Bucket:
  """Merges two buckets of the same kinds, and adds default target modules."""
  parts = []
  for part, other_part in zip(a.parts, b.parts, strict=True):
    if part.modules:
      parts.append(part)
      continue
    groups = method_entry(part.kind).roles.values()
    roles = {role for group in groups for role in group}
    paths = {path for path, role in sites.items() if role in roles}
    paths |= {*part.sites, *other_part.sites}
    parts.append(
      dataclasses.replace(
        part,
        rank=max(part.rank, other_part.rank),
        sites=tuple(path for path in sites if path in paths),
      )
    )
  return Bucket('', tuple(parts))


def _rename_parts(bucket: Bucket, name: str) -> Bucket:
  """Names a bucket and its parts."""
  several = len(bucket.parts) > 1
  return Bucket(
    name,
    tuple(
      dataclasses.replace(part, name=f'{name}.{i}' if several else name)
      for i, part in enumerate(bucket.parts)
    ),
  )
